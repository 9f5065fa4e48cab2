/* Loads weights: converts elements, packs rows into panels, copies them to the device. */
#include <pthread.h>
#include <stdio.h>
#include <string.h>

#include "model/weight_buffers.h"

static float half_to_float(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023,
             bits;
    float f;
    if (exponent == 31) {
        bits = sign | 0x7f800000u | mantissa << 13;
    } else if (exponent) {
        bits = sign | (exponent + 112) << 23 | mantissa << 13;
    } else {
        f = (float)mantissa * 0x1p-24f;
        memcpy(&bits, &f, 4);
        bits |= sign;
    }
    memcpy(&f, &bits, 4);
    return f;
}

/* Rounds to the nearest bfloat16, ties to even. */
static uint16_t float_to_bfloat(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u)
        return (uint16_t)(bits >> 16 | 64); /* NaN stays NaN */
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* Rounds to the nearest float16, ties to even. */
static uint16_t float_to_half(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
    bits &= 0x7fffffffu;
    if (bits >= 0x7f800000u)
        return (uint16_t)(sign | 0x7c00 | (bits > 0x7f800000u ? 0x200 : 0));
    if (bits >= 0x477ff000u)
        return (uint16_t)(sign | 0x7c00); /* rounds to infinity */
    if (bits < 0x38800000u) {             /* subnormal or zero: the addition rounds */
        float magnitude;
        memcpy(&magnitude, &bits, 4);
        magnitude += 0.5f;
        memcpy(&bits, &magnitude, 4);
        return (uint16_t)(sign | (bits - 0x3f000000u));
    }
    bits += 0xc8000fffu + (bits >> 13 & 1);
    return (uint16_t)(sign | bits >> 13);
}

static float source_float(const struct weight_source *source, size_t i) {
    if (source->type == WEIGHT_F32) {
        float f;
        memcpy(&f, (const char *)source->data + 4 * i, 4); /* files do not align their data */
        return f;
    }
    uint16_t h;
    memcpy(&h, (const char *)source->data + 2 * i, 2);
    if (source->type == WEIGHT_F16)
        return half_to_float(h);
    uint32_t bits = (uint32_t)h << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

/* The source that holds row *n of the stacked sources; *n becomes the row within it. */
static const struct weight_source *source_find(const struct weight_source *sources, int n_sources,
                                               uint32_t *n) {
    for (int i = 0; i < n_sources; i++) {
        if (*n < sources[i].rows)
            return &sources[i];
        *n -= sources[i].rows;
    }
    return NULL;
}

/* Writes one row of the matrix to its lane of a panel, where the pad stays zero. */
static void row_pack(const struct weight_source *source, uint32_t row, uint32_t type, uint32_t k,
                     char *panel, uint32_t lane) {
    size_t first = (size_t)row * k;
    uint32_t inputs = op_cell_inputs(type);
    if (type == source->type) {
        size_t element = type == WEIGHT_F32 ? 4 : 2;
        const char *from = (const char *)source->data + first * element;
        char *to = panel + lane * 16;
        for (uint32_t cell = 0; cell < k / inputs; cell++, from += 16, to += OP_PANEL * 16)
            memcpy(to, from, 16);
        memcpy(to, from, k % inputs * element);
        return;
    }
    for (uint32_t i = 0; i < k; i++) {
        float f = source_float(source, first + i);
        size_t at = ((size_t)(i / inputs) * OP_PANEL + lane) * inputs + i % inputs;
        if (type == WEIGHT_F32) {
            memcpy(panel + 4 * at, &f, 4);
        } else {
            uint16_t h = type == WEIGHT_BF16 ? float_to_bfloat(f) : float_to_half(f);
            memcpy(panel + 2 * at, &h, 2);
        }
    }
}

struct pack {
    const struct weight_source *sources;
    int n_sources;
    uint32_t type, k, first, count; /* rows [first, first + count) into `out` */
    char *out;
};

static void *panels_pack(void *argument) {
    const struct pack *pack = argument;
    uint64_t panel_bytes = op_matrix_bytes(pack->type, OP_PANEL, pack->k);
    for (uint32_t n = 0; n < (pack->count + OP_PANEL - 1) / OP_PANEL * OP_PANEL; n++) {
        char *panel = pack->out + n / OP_PANEL * panel_bytes;
        if (n % OP_PANEL == 0 && (pack->k % 16 || n + OP_PANEL > pack->count))
            memset(panel, 0, panel_bytes); /* only panels that keep a pad */
        uint32_t row = pack->first + n;
        const struct weight_source *source = n < pack->count
                                                 ? source_find(pack->sources, pack->n_sources, &row)
                                                 : NULL;
        if (source)
            row_pack(source, row, pack->type, pack->k, panel, n % OP_PANEL);
    }
    return NULL;
}

/* Packs rows [first, first + count), with two threads unless the panels are few. */
static void panels_pack_parallel(const struct pack *whole) {
    uint32_t n_panels = (whole->count + OP_PANEL - 1) / OP_PANEL;
    uint64_t panel_bytes = op_matrix_bytes(whole->type, OP_PANEL, whole->k);
    struct pack parts[2] = {*whole, *whole};
    pthread_t thread;
    if (n_panels < 4) {
        panels_pack(&parts[0]);
        return;
    }
    parts[0].count = n_panels / 2 * OP_PANEL;
    parts[1].first += parts[0].count;
    parts[1].count -= parts[0].count;
    parts[1].out += n_panels / 2 * panel_bytes;
    int threaded = pthread_create(&thread, NULL, panels_pack, &parts[1]) == 0;
    panels_pack(&parts[0]);
    if (threaded)
        pthread_join(thread, NULL);
    else
        panels_pack(&parts[1]);
}

void weight_panels_pack(const struct weight_source *source, uint32_t type, void *out) {
    struct pack pack = {
        .sources = source,
        .n_sources = 1,
        .type = type,
        .k = source->columns,
        .count = source->rows,
        .out = out,
    };
    panels_pack_parallel(&pack);
}

static int shape_check(const char *name, int layer, const struct weight_source *sources,
                       int n_sources, uint32_t n, uint32_t k, struct error *error) {
    uint64_t rows = 0;
    for (int i = 0; i < n_sources; i++) {
        if (sources[i].columns != k)
            return error_set(error, ERROR_MODEL,
                             "%s of layer %d has %u columns, the configuration says %u", name,
                             layer, sources[i].columns, k);
        rows += sources[i].rows;
    }
    if (rows != n)
        return error_set(error, ERROR_MODEL,
                         "%s of layer %d has %llu rows, the configuration says %u", name, layer,
                         (unsigned long long)rows, n);
    return 0;
}

/* The factor on what attention and MLP add to the residual stream, for the matrix or the bias that
 * they end with; 0 for others and where there is none. */
static float added_scale(const struct model_facts *f, const char *name) {
    int added = strcmp(name, "o") == 0 || strcmp(name, "down") == 0 || strcmp(name, "b_o") == 0 ||
                strcmp(name, "b_down") == 0;
    return added && f->residual_scale != 1 ? f->residual_scale : 0;
}

int model_matrix_load(struct model *model, const char *name, int layer,
                      const struct weight_source *sources, int n_sources, struct error *error) {
    uint32_t n, k;
    struct op_matrix *matrix = model_matrix_find(model, name, layer, &n, &k);
    if (!matrix)
        return error_set(error, ERROR_MODEL, "no matrix %s in layer %d", name, layer);
    if (matrix->n_segments)
        return error_set(error, ERROR_MODEL, "%s of layer %d is loaded already", name, layer);
    if (shape_check(name, layer, sources, n_sources, n, k, error))
        return -1;
    struct op_matrix made = {
        .type = model->facts.weight_type,
        .n = n,
        .k = k,
        .k_cells = op_matrix_cells(model->facts.weight_type, k),
        .scale = added_scale(&model->facts, name),
    };
    uint64_t panel_bytes = op_matrix_bytes(made.type, OP_PANEL, k);
    if (panel_bytes > staging_bytes(model))
        return error_set(error, ERROR_MODEL,
                         "%s of layer %d has rows of %u, too long for the staging memory", name,
                         layer, k);
    uint32_t segment_rows = (uint32_t)(GPU_BUFFER_MAX / 2 / panel_bytes) * OP_PANEL,
             step_rows = (uint32_t)(staging_bytes(model) / panel_bytes) * OP_PANEL;
    for (uint32_t first = 0; first < n; first += segment_rows) {
        uint32_t count = n - first < segment_rows ? n - first : segment_rows;
        struct gpu_buffer *buffer;
        uint64_t offset;
        if (made.n_segments == OP_MATRIX_SEGMENTS)
            return error_set(error, ERROR_MODEL, "%s is too large: more than %d segments", name,
                             OP_MATRIX_SEGMENTS);
        if (weight_buffer_cut(model, op_matrix_bytes(made.type, count, k), &buffer, &offset, error))
            return -1;
        made.segments[made.n_segments].address = gpu_buffer_address(buffer) + offset;
        made.segments[made.n_segments].first = first;
        made.segments[made.n_segments++].count = count;
        for (uint32_t row = 0; row < count; row += step_rows) {
            uint32_t rows = count - row < step_rows ? count - row : step_rows;
            struct gpu_buffer *staging = NULL;
            if (staging_buffer_next(model, &staging, error))
                return -1;
            struct pack pack = {
                .sources = sources,
                .n_sources = n_sources,
                .type = made.type,
                .k = k,
                .first = first + row,
                .count = rows,
                .out = gpu_buffer_map(staging),
            };
            panels_pack_parallel(&pack);
            if (gpu_queue_copy(model->ops.queue, staging, 0, buffer,
                               offset + row / OP_PANEL * panel_bytes,
                               op_matrix_bytes(made.type, rows, k), error))
                return -1;
        }
    }
    *matrix = made;
    return 0;
}

/* Where a vector of n floats goes, and how many bytes: padded with zeros to the stride of a row,
 * because kernels may read all of it. Not padded are the norms of heads that have biases: a bias
 * lies right behind its gain, n floats further on, where attn_step reads it, and the first of the
 * two that is loaded takes memory for both. */
static int vector_place(struct model *model, const char *name, int layer, uint32_t n,
                        struct gpu_buffer **buffer, uint64_t *offset, uint64_t *bytes,
                        struct error *error) {
    uint64_t gain_bytes = 4 * (uint64_t)n;
    int bias = name[0] == 'b';
    const char *norm = name + 2 * bias;
    char other[16];
    uint32_t n_other;
    *bytes = 4 * (uint64_t)op_row_stride(n);
    if (!model->facts.qk_norm_bias || (strcmp(norm, "q_norm") != 0 && strcmp(norm, "k_norm") != 0))
        return weight_buffer_cut(model, *bytes, buffer, offset, error);
    *bytes = gain_bytes;
    snprintf(other, sizeof other, "%s%s", bias ? "" : "b_", norm);
    const uint64_t *beside = model_vector_find(model, other, layer, &n_other);
    if (!beside || !*beside) {
        if (weight_buffer_cut(model, 2 * gain_bytes, buffer, offset, error))
            return -1;
        *offset += bias ? gain_bytes : 0;
        return 0;
    }
    return weight_buffer_at(model, bias ? *beside + gain_bytes : *beside - gain_bytes, buffer,
                            offset, error);
}

int model_vector_load(struct model *model, const char *name, int layer,
                      const struct weight_source *sources, int n_sources, struct error *error) {
    uint32_t n, at = 0;
    uint64_t *vector = model_vector_find(model, name, layer, &n);
    if (!vector)
        return error_set(error, ERROR_MODEL, "no vector %s in layer %d", name, layer);
    if (shape_check(name, layer, sources, n_sources, n, 1, error))
        return -1;
    uint64_t bytes, offset;
    struct gpu_buffer *buffer, *staging = NULL;
    if (4 * (uint64_t)op_row_stride(n) > staging_bytes(model) ||
        vector_place(model, name, layer, n, &buffer, &offset, &bytes, error) ||
        staging_buffer_next(model, &staging, error))
        return -1;
    float *out = gpu_buffer_map(staging);
    memset(out, 0, bytes);
    float shift = name[0] == 'b' ? 0.0f : model->facts.norm_offset; /* biases are not gains */
    /* the logits' factor is the same for all of them, so it can stand in the last norm */
    float scale = strstr(name, "ln_final") ? model->facts.logit_scale : 1.0f,
          added = added_scale(&model->facts, name);
    if (added != 0)
        scale = added;
    for (int i = 0; i < n_sources; i++)
        for (uint32_t j = 0; j < sources[i].rows; j++)
            out[at++] = (source_float(&sources[i], j) + shift) * scale;
    if (gpu_queue_copy(model->ops.queue, staging, 0, buffer, offset, bytes, error))
        return -1;
    *vector = gpu_buffer_address(buffer) + offset;
    return 0;
}
