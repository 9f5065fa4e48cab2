/* PackedRows: the rows of one batch, packed without padding. Arrays are borrowed, their values are
 * checked by every call that takes the rows (batch.c). */
#include "engine.h"

#include <stddef.h>

/* Fields that are arrays. length: 'B' rows, 'L' layers, 'T' tokens, 'D' tokens x D. */
static const struct {
    const char *name;
    char type, length;
    int required;
    size_t offset; /* of the pointer in struct run_batch */
} fields[PACKED_ROWS_ARRAYS] = {
    {"tokens", 'I', 'T', 1, offsetof(struct run_batch, tokens)},
    {"n_tokens", 'I', 'B', 1, offsetof(struct run_batch, n_tokens)},
    {"start", 'I', 'B', 1, offsetof(struct run_batch, start)},
    {"slot", 'I', 'B', 1, offsetof(struct run_batch, slot)},
    {"group", 'I', 'B', 1, offsetof(struct run_batch, group)},
    {"edit_row", 'I', 'B', 1, offsetof(struct run_batch, edit_row)},
    {"out_row", 'i', 'B', 1, offsetof(struct run_batch, out_row)},
    {"column", 'i', 'B', 1, offsetof(struct run_batch, column)},
    {"key_column", 'i', 'B', 1, offsetof(struct run_batch, key_column)},
    {"q_row", 'I', 'B', 0, offsetof(struct run_batch, q_row)},
    {"v_row", 'I', 'B', 0, offsetof(struct run_batch, v_row)},
    {"mlp_row", 'I', 'B', 0, offsetof(struct run_batch, mlp_row)},
    {"frozen", 'B', 'L', 0, offsetof(struct run_batch, frozen)},
    {"inputs", 'f', 'D', 0, offsetof(struct run_batch, inputs)},
};

static const void **pointer_of(struct run_batch *batch, int field) {
    return (const void **)((char *)batch + fields[field].offset);
}

/* Borrows the arrays; None or nothing leaves NULL. */
static int arrays_borrow(struct packed_rows_object *self, PyObject *const *in) {
    for (int i = 0; i < PACKED_ROWS_ARRAYS; i++) {
        if (!in[i] || in[i] == Py_None) {
            if (fields[i].required)
                return PyErr_Format(PyExc_TypeError, "%s is missing", fields[i].name), -1;
            continue;
        }
        self->arrays[i] = array_view(in[i], fields[i].type, fields[i].name,
                                     pointer_of(&self->batch, i), &self->lengths[i]);
        if (!self->arrays[i])
            return -1;
    }
    return 0;
}

static PyObject *packed_rows_new(PyTypeObject *type, PyObject *args, PyObject *keywords) {
    static char *names[] = {"tokens",    "n_tokens", "start",  "slot",        "group",
                            "edit_row",  "out_row",  "column", "key_column",  "q_row",
                            "v_row",     "mlp_row",  "frozen", "inputs",      "n_out_rows",
                            "n_columns", "n_keys",   "edits",  "first_layer", "stop_layer",
                            "decode",    NULL};
    PyObject *in[PACKED_ROWS_ARRAYS] = {NULL}, *edits = Py_None;
    allocfunc allocate = PyType_GetSlot(type, Py_tp_alloc);
    struct packed_rows_object *self = (struct packed_rows_object *)allocate(type, 0);
    if (!self)
        return NULL;
    struct run_batch *batch = &self->batch;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "|$OOOOOOOOOOOOOOIIIOIIp", names, &in[0],
                                     &in[1], &in[2], &in[3], &in[4], &in[5], &in[6], &in[7], &in[8],
                                     &in[9], &in[10], &in[11], &in[12], &in[13], &self->n_out_rows,
                                     &batch->n_columns, &batch->n_keys, &edits, &batch->first_layer,
                                     &batch->stop_layer, &batch->decode) ||
        arrays_borrow(self, in)) {
        Py_DECREF((PyObject *)self);
        return NULL;
    }
    if (edits != Py_None) {
        if ((PyObject *)Py_TYPE(edits) != engine_state_of((PyObject *)self)->edits_type) {
            PyErr_SetString(PyExc_TypeError, "edits must be Edits or None");
            Py_DECREF((PyObject *)self);
            return NULL;
        }
        self->edits = (struct edits_object *)Py_NewRef(edits);
        batch->edits = &self->edits->list;
    }
    return (PyObject *)self;
}

static void packed_rows_dealloc(PyObject *object) {
    struct packed_rows_object *self = (struct packed_rows_object *)object;
    PyTypeObject *type = Py_TYPE(object);
    for (int i = 0; i < PACKED_ROWS_ARRAYS; i++)
        Py_XDECREF(self->arrays[i]);
    Py_XDECREF((PyObject *)self->edits);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(object);
    Py_DECREF(type);
}

/* Do the arrays of this kind of length have so many items? */
static int lengths_check(const struct packed_rows_object *self, char kind, uint64_t expected) {
    for (int i = 0; i < PACKED_ROWS_ARRAYS; i++)
        if (fields[i].length == kind && self->arrays[i] && (uint64_t)self->lengths[i] != expected) {
            PyErr_Format(PyExc_ValueError, "%s has %zd items, not %llu", fields[i].name,
                         self->lengths[i], (unsigned long long)expected);
            return -1;
        }
    return 0;
}

/* Every output place lies inside the arrays that will be made. */
static int places_check(const struct packed_rows_object *self) {
    const struct run_batch *b = &self->batch;
    for (uint32_t r = 0; r < b->n_rows; r++) {
        if (b->out_row[r] < 0)
            continue;
        int64_t first = (int64_t)b->column[r] + b->start[r], end = first + b->n_tokens[r];
        int64_t key_end = (int64_t)b->key_column[r] + b->start[r] + b->n_tokens[r];
        if ((uint32_t)b->out_row[r] >= self->n_out_rows || first < 0 || end > b->n_columns ||
            b->key_column[r] < 0 || key_end > b->n_keys) {
            PyErr_Format(PyExc_ValueError, "row %u does not fit the output arrays", r);
            return -1;
        }
    }
    return 0;
}

int packed_rows_check(struct packed_rows_object *self, const struct model_facts *f,
                      uint64_t *total) {
    struct run_batch *b = &self->batch;
    Py_ssize_t n_rows = self->lengths[PACKED_ROWS_N_TOKENS];
    *total = 0;
    if (n_rows < 1 || n_rows > 1 << 20)
        return PyErr_Format(PyExc_ValueError, "a batch of %zd rows", n_rows), -1;
    b->n_rows = (uint32_t)n_rows;
    if (lengths_check(self, 'B', b->n_rows)) /* before a value of a row is read */
        return -1;
    for (uint32_t r = 0; r < b->n_rows; r++) {
        if (b->n_tokens[r] == 0 || b->n_tokens[r] > 1u << 24 || b->start[r] > 1u << 24)
            return PyErr_Format(PyExc_ValueError, "row %u has no tokens, or far too many", r), -1;
        *total += b->n_tokens[r];
    }
    if ((uint64_t)self->lengths[PACKED_ROWS_TOKENS] != *total)
        return PyErr_SetString(PyExc_ValueError, "tokens and n_tokens do not fit together"), -1;
    if (b->frozen && (!b->q_row || !b->v_row || !b->mlp_row))
        return PyErr_SetString(PyExc_TypeError, "frozen layers need q_row, v_row and mlp_row"), -1;
    return lengths_check(self, 'L', f->n_layers) || lengths_check(self, 'D', *total * f->d_model) ||
                   places_check(self)
               ? -1
               : 0;
}

static PyType_Slot packed_rows_slots[] = {
    {Py_tp_new, packed_rows_new},
    {Py_tp_dealloc, packed_rows_dealloc},
    {Py_tp_doc, "PackedRows(*, tokens, n_tokens, start, slot, ...): the rows of one batch; see "
                "python/vksteer/_engine.pyi for fields and shapes."},
    {0, NULL}};
PyType_Spec packed_rows_spec = {
    .name = "vksteer._engine.PackedRows",
    .basicsize = sizeof(struct packed_rows_object),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = packed_rows_slots,
};
