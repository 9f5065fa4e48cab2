/* The facts of a model out of a dict. */
#include "engine.h"

#include <stdlib.h>

static double fact(PyObject *facts, const char *name) {
    PyObject *value = PyDict_GetItemString(facts, name);
    if (!value) {
        PyErr_Format(PyExc_KeyError, "fact %s is missing", name);
        return -1;
    }
    return PyFloat_AsDouble(value);
}

static int fact_list(PyObject *facts, const char *name, uint32_t *out, uint32_t n) {
    PyObject *list = PyDict_GetItemString(facts, name);
    if (!list || !PyList_Check(list) || PyList_Size(list) != (Py_ssize_t)n) {
        PyErr_Format(PyExc_ValueError, "fact %s must be a list of %u", name, n);
        return -1;
    }
    for (uint32_t i = 0; i < n; i++) {
        long long value = PyLong_AsLongLong(PyList_GetItem(list, i)); /* -1: none */
        if (PyErr_Occurred())
            return -1;
        out[i] = value < 0 || value > UINT32_MAX ? UINT32_MAX : (uint32_t)value;
    }
    return 0;
}

static int integers_read(PyObject *dict, struct model_facts *f) {
    const struct {
        const char *name;
        uint32_t *to;
    } integers[] = {{"n_layers", &f->n_layers},
                    {"d_model", &f->d_model},
                    {"n_heads", &f->n_heads},
                    {"n_kv_heads", &f->n_kv_heads},
                    {"d_head", &f->d_head},
                    {"d_mlp", &f->d_mlp},
                    {"d_vocab", &f->d_vocab},
                    {"n_ctx", &f->n_ctx},
                    {"act", &f->act},
                    {"weight_type", &f->weight_type},
                    {"norm", &f->norm},
                    {"qk_norm", &f->qk_norm},
                    {"d_rot", &f->d_rot},
                    {"query_length", &f->query_length},
                    {"rope_switch", &f->rope_switch}};
    for (size_t i = 0; i < sizeof integers / sizeof integers[0]; i++) {
        double value = fact(dict, integers[i].name);
        if (PyErr_Occurred())
            return -1;
        /* out of range: refused by the check of facts */
        *integers[i].to = value >= 0 && value < 4e9 ? (uint32_t)value : UINT32_MAX;
    }
    return 0;
}

int model_facts_read(PyObject *dict, struct model_facts *f) {
    const struct {
        const char *name;
        float *to;
    } numbers[] = {{"norm_eps", &f->norm_eps},
                   {"norm_offset", &f->norm_offset},
                   {"embed_scale", &f->embed_scale},
                   {"attn_scale", &f->attn_scale},
                   {"attn_softcap", &f->attn_softcap},
                   {"final_softcap", &f->final_softcap},
                   {"residual_scale", &f->residual_scale},
                   {"logit_scale", &f->logit_scale},
                   {"clip_qkv", &f->clip_qkv},
                   {"query_beta", &f->query_beta}};
    const struct {
        const char *name;
        int *to;
    } flags[] = {{"norm_bias", &f->norm_bias},
                 {"pre_norms", &f->pre_norms},
                 {"post_norms", &f->post_norms},
                 {"parallel", &f->parallel},
                 {"gated", &f->gated},
                 {"pos_embed", &f->pos_embed},
                 {"qk_norm_bias", &f->qk_norm_bias},
                 {"qkv_bias", &f->qkv_bias},
                 {"o_bias", &f->o_bias},
                 {"mlp_bias", &f->mlp_bias},
                 {"unembed_bias", &f->unembed_bias},
                 {"tied", &f->tied},
                 {"rope_interleaved", &f->rope_interleaved}};
    if (integers_read(dict, f))
        return -1;
    for (size_t i = 0; i < sizeof numbers / sizeof numbers[0]; i++)
        *numbers[i].to = (float)fact(dict, numbers[i].name);
    for (size_t i = 0; i < sizeof flags / sizeof flags[0]; i++)
        *flags[i].to = fact(dict, flags[i].name) != 0;
    if (PyErr_Occurred())
        return -1;
    if (f->n_layers > MODEL_LAYERS_MAX) {
        PyErr_Format(PyExc_ValueError, "%u layers are too many", f->n_layers);
        return -1;
    }
    return fact_list(dict, "window", f->window, f->n_layers) ||
           fact_list(dict, "rope_table", f->rope_table, f->n_layers);
}

/* facts["rope"]: list of (list of d_rot / 2 floats, factor), those for long texts last. Fills
 * malloc'ed tables. */
int model_ropes_read(PyObject *dict, struct model_facts *f, double **tables, double *factors) {
    PyObject *list = PyDict_GetItemString(dict, "rope");
    Py_ssize_t n = list && PyList_Check(list) ? PyList_Size(list) : 0;
    if (!list || !PyList_Check(list) || n > MODEL_ROPES_MAX || (f->rope_switch && n % 2)) {
        PyErr_SetString(PyExc_ValueError, "fact rope must be a list of at most four tables");
        return -1;
    }
    f->n_ropes = (uint32_t)n >> (f->rope_switch > 0);
    for (Py_ssize_t i = 0; i < n; i++) {
        PyObject *frequencies;
        if (!PyArg_ParseTuple(PyList_GetItem(list, i), "Od", &frequencies, &factors[i]))
            return -1;
        if (!PyList_Check(frequencies) || PyList_Size(frequencies) != (Py_ssize_t)f->d_rot / 2) {
            PyErr_SetString(PyExc_ValueError, "a rotation table must have d_rot / 2 frequencies");
            return -1;
        }
        tables[i] = malloc((f->d_rot / 2 + 1) * sizeof(double));
        if (!tables[i]) {
            PyErr_NoMemory();
            return -1;
        }
        for (uint32_t j = 0; j < f->d_rot / 2; j++)
            tables[i][j] = PyFloat_AsDouble(PyList_GetItem(frequencies, j));
        if (PyErr_Occurred())
            return -1;
    }
    return 0;
}
