/* Edits: the compiled edits of one batch. */
#include "engine.h"

#include <stdlib.h>
#include <string.h>

/* site, layer, row, kind, start, stop, step, first_position, n_positions, first_head, n_heads,
 * operand, pos_step, head_step, step */
#define EDIT_FIELDS 15

static void edit_unpack(struct edit *edit, const int64_t *from, float coefficient) {
    *edit = (struct edit){
        .site = (int32_t)from[0],
        .layer = (int32_t)from[1],
        .row = (int32_t)from[2],
        .kind = (uint32_t)from[3],
        .start = (uint32_t)from[4],
        .stop = (uint32_t)from[5],
        .step_pos = (uint32_t)from[6],
        .first_position = (uint32_t)from[7],
        .n_positions = (uint32_t)from[8],
        .first_head = (uint32_t)from[9],
        .n_heads = (uint32_t)from[10],
        .operand = (uint64_t)from[11],
        .pos_step = (uint32_t)from[12],
        .head_step = (uint32_t)from[13],
        .step = (uint32_t)from[14],
        .coefficient = coefficient,
    };
}

static int edits_fill(struct edits_object *self, const int64_t *records, Py_ssize_t n,
                      const float *coefficients, const uint32_t *positions, Py_ssize_t n_positions,
                      const uint32_t *heads, Py_ssize_t n_heads, const float *operands,
                      Py_ssize_t n_operands, uint32_t n_rows, struct error *error) {
    struct edit_list *list = &self->list;
    struct model *model = self->owner->model;
    list->edits = calloc((size_t)n + 1, sizeof *list->edits);
    self->positions = malloc(4 * (size_t)n_positions + 4);
    self->heads = malloc(4 * (size_t)n_heads + 4);
    if (!list->edits || !self->positions || !self->heads)
        return error_set(error, ERROR_MEMORY, "out of memory for edits");
    memcpy(self->positions, positions, 4 * (size_t)n_positions);
    memcpy(self->heads, heads, 4 * (size_t)n_heads);
    for (Py_ssize_t i = 0; i < n; i++)
        edit_unpack(&list->edits[i], records + i * EDIT_FIELDS, coefficients[i]);
    list->n_edits = (uint32_t)n;
    list->positions = self->positions;
    list->heads = self->heads;
    list->n_positions = (uint32_t)n_positions;
    list->n_heads = (uint32_t)n_heads;
    list->n_operands = (uint64_t)n_operands;
    for (Py_ssize_t i = 0; i < n; i++) {
        const struct edit *edit = &list->edits[i];
        if (edit->kind > EDIT_DYNAMIC)
            return error_set(error, ERROR_VALUE, "edit %zd: no kind %u", i, edit->kind);
        uint32_t site_heads, width;
        if (edit->site < 0 || edit->site >= SITE_COUNT)
            continue; /* edit_list_index refuses it */
        if (edit->layer >= 0 && (uint32_t)edit->layer < model->facts.n_layers &&
            !site_exists(edit->site, edit->layer, &model->facts))
            return error_set(error, ERROR_VALUE, "edit %zd: this model has no %s in layer %d", i,
                             site_name(edit->site), edit->layer);
        if (edit->kind == EDIT_DYNAMIC && site_kind(edit->site) != SITE_KIND_WIDTH)
            return error_set(error, ERROR_VALUE, "edit %zd: %s has not the model's width", i,
                             site_name(edit->site));
        site_shape(edit->site, &model->facts, &site_heads, &width);
        for (uint32_t h = 0;
             h < edit->n_heads && (uint64_t)edit->first_head + h < (uint64_t)n_heads; h++)
            if (heads[edit->first_head + h] >= site_heads)
                return error_set(error, ERROR_VALUE, "edit %zd: head %u of %s, which has %u", i,
                                 heads[edit->first_head + h], site_name(edit->site), site_heads);
    }
    if (edit_list_index(list, SITE_COUNT, model->facts.n_layers, n_rows, error))
        return -1;
    if (gpu_buffer_create(&self->operands, model->ops.device, 4 * (uint64_t)n_operands, GPU_UPLOAD,
                          "edit values", error))
        return -1;
    memcpy(gpu_buffer_map(self->operands), operands, 4 * (size_t)n_operands);
    list->operand_address = gpu_buffer_address(self->operands);
    return 0;
}

static PyObject *edits_new(PyTypeObject *type, PyObject *args, PyObject *keywords) {
    static char *names[] = {"model", "records",  "coefficients", "positions",
                            "heads", "operands", "n_rows",       NULL};
    static const char types[5] = {'q', 'f', 'I', 'I', 'f'};
    PyObject *model, *arrays[5], *views[5] = {NULL}, *object = NULL;
    unsigned int n_rows;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "OOOOOOI", names, &model, &arrays[0],
                                     &arrays[1], &arrays[2], &arrays[3], &arrays[4], &n_rows))
        return NULL;
    const void *data[5];
    Py_ssize_t n[5];
    struct error error = {0};
    int valid = 1;
    for (int i = 0; valid && i < 5; i++) {
        views[i] = array_view(arrays[i], types[i], names[i + 1], &data[i], &n[i]);
        valid = views[i] != NULL;
    }
    if (valid && (n[0] != n[1] * EDIT_FIELDS || n[4] == 0 || n[1] > INT32_MAX)) {
        PyErr_SetString(PyExc_ValueError,
                        "edit records, coefficients and operands do not fit together");
        valid = 0;
    }
    if (valid)
        object = engine_owned_new(type, model, 1, "Edits needs a Model");
    if (object) {
        int failed = edits_fill((struct edits_object *)object, data[0], n[1], data[1], data[2],
                                n[2], data[3], n[3], data[4], n[4], n_rows, &error);
        object = engine_owned_made(object, failed, &error);
    }
    for (int i = 0; i < 5; i++)
        Py_XDECREF(views[i]);
    return object;
}

static void edits_destroy(PyObject *object) {
    struct edits_object *self = (struct edits_object *)object;
    gpu_buffer_destroy(self->operands);
    edit_list_clear(&self->list);
    free(self->list.edits);
    free(self->positions);
    free(self->heads);
}

static void edits_dealloc(PyObject *object) { engine_owned_free(object, edits_destroy); }

static PyType_Slot edits_slots[] = {{Py_tp_new, edits_new},
                                    {Py_tp_dealloc, edits_dealloc},
                                    {Py_tp_doc, "Edits(...): edits of one batch as plain data."},
                                    {0, NULL}};
PyType_Spec edits_spec = {
    .name = "vksteer._engine.Edits",
    .basicsize = sizeof(struct edits_object),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = edits_slots,
};
