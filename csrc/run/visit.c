/* What happens at a site: its edits in their order, then its captures. */
#include <math.h>
#include <stdlib.h>

#include "run/tape.h"

int site_edited(const struct run_work *work, int site, int layer) {
    return edit_first(work->chunk.batch->edits, site, layer) != NULL;
}

int site_scaled(const struct run_work *work, int site, int layer) {
    const struct edit_list *list = work->chunk.batch->edits;
    const struct edit *edit = edit_first(list, site, layer);
    while (edit && edit->kind != EDIT_ADD_SCALED)
        edit = edit_next(list, edit);
    return edit != NULL;
}

/* `edit`, or the next one after it that acts on the view. */
static const struct edit *edit_acting(const struct edit_list *list, const struct site_view *view,
                                      const struct edit *edit) {
    while (edit && view->edits != EDITS_ALL &&
           (edit->kind == EDIT_ADD_SCALED) != (view->edits == EDITS_SCALED))
        edit = edit_next(list, edit);
    return edit;
}

static const struct run_capture *capture_find(const struct run_batch *batch, int site, int layer) {
    for (uint32_t i = 0; i < batch->n_captures; i++)
        if (batch->captures[i].site == site && batch->captures[i].layer == layer)
            return &batch->captures[i];
    return NULL;
}

int site_wanted(const struct run_work *work, int site, int layer) {
    return site_edited(work, site, layer) || capture_find(work->chunk.batch, site, layer) != NULL ||
           tape_scaling(work, site, layer) != NULL;
}

/* Edits that differ only in row, operand and coefficient share one dispatch. Rows ascend, so no
 * token occurs twice in it. */
static int edits_merge(const struct edit_list *list, const struct edit *a, const struct edit *b) {
    if (a->row < 0 || b->row <= a->row || a->kind != b->kind || a->head_step != b->head_step ||
        a->step != b->step || a->n_heads != b->n_heads)
        return 0;
    for (uint32_t i = 0; i < a->n_heads; i++)
        if (list->heads[a->first_head + i] != list->heads[b->first_head + i])
            return 0;
    return 1;
}

/* Appends the view's tokens that `edit` selects to `entries`. */
static int entries_add(struct run_work *work, const struct site_view *view, const struct edit *edit,
                       struct edit_entry *entries, uint32_t *n, struct error *error) {
    const struct edit_list *list = work->chunk.batch->edits;
    for (uint32_t t = 0; t < view->n_tokens; t++) {
        struct token_place place = work->chunk.places[view->first + t];
        uint32_t ordinal;
        if (!edit_touches(list, edit, work->chunk.batch->edit_row[place.row], place.pos, &ordinal))
            continue;
        uint32_t width = site_kind(view->site) == SITE_KIND_KEYS ? place.pos + 1 : view->width;
        uint64_t first = edit->operand + (uint64_t)ordinal * edit->pos_step;
        if (first + (uint64_t)(edit->n_heads - 1) * edit->head_step +
                (uint64_t)(width - 1) * edit->step >=
            list->n_operands)
            return error_set(error, ERROR_VALUE, "an edit of %s has no value for position %u",
                             site_name(view->site), place.pos);
        if (first > UINT32_MAX)
            return error_set(error, ERROR_VALUE,
                             "the edits' values are too large together: more than 16 GB");
        entries[(*n)++] = (struct edit_entry){
            .token = t,
            .operand = (uint32_t)first,
            .coefficient = edit->coefficient,
        };
    }
    return 0;
}

/* One group of edits that merge: the one dispatch of `first` with the entries of all. */
static int edits_dispatch(struct run_work *work, const struct site_view *view,
                          const struct edit *first, const struct edit_entry *entries, uint32_t n,
                          struct error *error) {
    const struct edit_list *list = work->chunk.batch->edits;
    uint64_t entries_address, heads_address;
    if (work_upload(work, entries, n * sizeof *entries, &entries_address, error))
        return -1;
    if (first->kind == EDIT_DYNAMIC) {
        struct scale_dynamic_params params = {
            .x = view->address,
            .entries = entries_address,
            .operand = list->operand_address,
            .width = view->width,
            .stride = view->token_stride,
        };
        return op_scale_dynamic(&work->model->ops, &params, n, error);
    }
    if (work_upload(work, list->heads + first->first_head, first->n_heads * sizeof *list->heads,
                    &heads_address, error))
        return -1;
    int over_keys = site_kind(view->site) == SITE_KIND_KEYS;
    struct edit_params params = {
        .x = view->address,
        .entries = entries_address,
        .operand = list->operand_address,
        .heads = heads_address,
        .scale = view->scale,
        .tokens = work->chunk.tokens + view->first * sizeof(struct token_meta),
        .token_stride = view->token_stride,
        .head_stride = view->head_stride,
        .width = view->width,
        .head_step = first->head_step,
        .step = first->step,
        /* without a norm before the value there is nothing to divide by */
        .kind = first->kind == EDIT_ADD_SCALED && !view->scale ? EDIT_ADD : first->kind,
        .flags = over_keys ? EDIT_KEYS : 0,
        .window = work->model->facts.window[view->layer],
    };
    return op_edit(&work->model->ops, &params, n, first->n_heads, error);
}

static int edits_apply(struct run_work *work, const struct site_view *view, struct error *error) {
    const struct edit_list *list = work->chunk.batch->edits;
    const struct edit *edit = edit_acting(list, view, edit_first(list, view->site, view->layer));
    if (!edit || view->n_tokens == 0)
        return 0;
    struct edit_entry *entries = malloc(view->n_tokens * sizeof *entries);
    if (!entries)
        return error_set(error, ERROR_MEMORY, "out of memory for edits");
    int failed = 0;
    for (uint32_t group = 0; edit && !failed; group++) {
        const struct edit *first = edit, *last;
        uint32_t n = 0;
        do {
            failed = entries_add(work, view, edit, entries, &n, error);
            last = edit;
            edit = edit_acting(list, view, edit_next(list, edit));
        } while (!failed && edit && edits_merge(list, last, edit));
        if (!failed && first->kind == EDIT_DYNAMIC && work->tape) /* its gradient needs its input */
            failed = tape_keep_value(work, view, group, error);
        if (!failed && n > 0)
            failed = edits_dispatch(work, view, first, entries, n, error);
    }
    free(entries);
    return failed ? -1 : 0;
}

/* Copies the view into readback memory, in as many ranges of tokens as that needs. masked: over
 * keys, the value of keys outside the causal window. */
static int capture_record(struct run_work *work, const struct site_view *view,
                          const struct run_capture *capture, float masked, struct error *error) {
    int over_keys = site_kind(view->site) == SITE_KIND_KEYS;
    uint32_t token_floats = view->n_heads * view->width, done = 0;
    while (done < view->n_tokens) {
        uint32_t n = view->n_tokens - done;
        uint64_t offset;
        if (work_readback_take(work, &n, token_floats, &offset, error))
            return -1;
        /* Consecutive heads are one row of the copy. */
        int dense = view->head_stride == view->width || view->n_heads == 1;
        struct copy_params params = {
            .x = view->address + 4 * (uint64_t)done * view->token_stride,
            .dst = gpu_buffer_address(work->readback) + 4 * offset,
            .n_rows = dense ? n : n * view->n_heads,
            .width = dense ? token_floats : view->width,
            .x_stride = dense ? view->token_stride : view->head_stride,
            .out_stride = dense ? token_floats : view->width,
        };
        struct readback readback = {
            .to = capture->to,
            .offset = offset,
            .first = view->first + done,
            .n = n,
            .token_floats = token_floats,
            .n_heads = view->n_heads,
            .width = view->width,
            .head_floats = view->width,
            .over_keys = over_keys,
            .masked = masked,
            .window = work->model->facts.window[view->layer],
        };
        if (op_copy(&work->model->ops, &params, error) ||
            work_readback_push(work, &readback, error))
            return -1;
        done += n;
    }
    return 0;
}

int site_visit(struct run_work *work, const struct site_view *view, struct error *error) {
    if (tape_scaling(work, view->site, view->layer) && tape_keep_value(work, view, 0, error))
        return -1;
    if (edits_apply(work, view, error))
        return -1;
    const struct run_capture *capture = capture_find(work->chunk.batch, view->site, view->layer);
    if (view->edits == EDITS_SCALED) /* the rest of the site's edits is still to come */
        return 0;
    return capture ? capture_record(work, view, capture,
                                    view->site == SITE_SCORES ? -INFINITY : 0.0f, error)
                   : 0;
}

/* The adjoint of one group of edits: an overwritten value gets no gradient, a scaled value gets it
 * scaled, a projection is its own adjoint, and an addition passes the gradient on. */
static int edits_adjoint(struct run_work *work, const struct site_view *view,
                         const struct edit *first, uint32_t group, struct edit_entry *entries,
                         uint32_t n, struct error *error) {
    const struct edit_list *list = work->chunk.batch->edits;
    uint64_t entries_address, heads_address, zero_address = 0;
    struct edit_params params = {
        .x = view->address,
        .operand = list->operand_address,
        .tokens = work->chunk.tokens,
        .token_stride = view->token_stride,
        .head_stride = view->head_stride,
        .width = view->width,
        .head_step = first->head_step,
        .step = first->step,
        .kind = first->kind,
    };
    if (first->kind == EDIT_SET) { /* times zero */
        const float zero = 0;
        if (work_upload(work, &zero, sizeof zero, &zero_address, error))
            return -1;
        params.operand = zero_address;
        params.kind = EDIT_SCALE;
        params.head_step = params.step = 0;
        for (uint32_t i = 0; i < n; i++)
            entries[i].operand = 0;
    }
    if (work_upload(work, entries, n * sizeof *entries, &entries_address, error))
        return -1;
    if (first->kind == EDIT_DYNAMIC) {
        struct scale_dynamic_bwd_params dynamic = {
            .d = view->address,
            .x = tape_kept_value(work->tape, view->site, view->layer, group),
            .entries = entries_address,
            .operand = list->operand_address,
            .width = view->width,
            .stride = view->token_stride,
            .x_stride = work->d_stride,
        };
        return op_scale_dynamic_bwd(&work->model->ops, &dynamic, n, error);
    }
    if (work_upload(work, list->heads + first->first_head, first->n_heads * sizeof *list->heads,
                    &heads_address, error))
        return -1;
    params.entries = entries_address;
    params.heads = heads_address;
    return op_edit(&work->model->ops, &params, n, first->n_heads, error);
}

/* The adjoint of all edits of a site: its groups as edits_apply makes them, the last one first. */
static int edits_backward(struct run_work *work, const struct site_view *view,
                          const struct edit **firsts, struct edit_entry *entries,
                          struct error *error) {
    const struct edit_list *list = work->chunk.batch->edits;
    uint32_t n_groups = 0;
    const struct edit *last = NULL;
    for (const struct edit *edit = edit_first(list, view->site, view->layer); edit;
         last = edit, edit = edit_next(list, edit))
        if (!last || !edits_merge(list, last, edit))
            firsts[n_groups++] = edit;
    firsts[n_groups] = NULL;
    for (uint32_t group = n_groups; group-- > 0;) {
        const struct edit *first = firsts[group];
        uint32_t n = 0;
        if (first->kind == EDIT_ADD)
            continue;
        if (first->kind == EDIT_ADD_SCALED || site_kind(view->site) == SITE_KIND_KEYS ||
            site_kind(view->site) == SITE_KIND_ONE)
            return error_set(error, ERROR_VALUE, "there is no gradient through an edit of %s",
                             site_name(view->site));
        for (const struct edit *edit = first; edit != firsts[group + 1];
             edit = edit_next(list, edit))
            if (entries_add(work, view, edit, entries, &n, error))
                return -1;
        if (n > 0 && edits_adjoint(work, view, first, group, entries, n, error))
            return -1;
    }
    return 0;
}

/* The scaling gradient of a site from its values before the edits and the view's gradient. */
static int scaling_record(struct run_work *work, const struct site_view *view,
                          const struct run_scaling *scaling, struct error *error) {
    struct run_tape *tape = work->tape;
    const struct run_batch *batch = work->chunk.batch;
    uint64_t value = tape_kept_value(tape, view->site, view->layer, 0), ranges;
    RUN(work_grow(work, &tape->dots, 4 * (uint64_t)tape->capacity, "dot products", error));
    struct row_dots_params dots = {
        .x = value,
        .y = view->address,
        .dst = run_address(tape->dots),
        .width = view->width,
        .x_stride = work->d_stride,
        .y_stride = view->token_stride,
    };
    RUN(op_row_dots(&work->model->ops, &dots, view->n_tokens, error));
    if (!scaling->sums) {
        struct site_view rows = *view;
        struct run_capture capture = {view->site, view->layer, scaling->to};
        rows.address = dots.dst;
        rows.token_stride = rows.n_heads = rows.head_stride = rows.width = 1;
        return capture_record(work, &rows, &capture, 0, error);
    }
    uint32_t *listed = malloc(2 * (size_t)batch->n_rows * sizeof *listed), at = 0;
    if (!listed)
        return error_set(error, ERROR_MEMORY, "out of memory for rows");
    for (uint32_t r = 0; r < batch->n_rows; r++) {
        uint32_t n = batch->n_tokens[r];
        listed[2 * r] = at + (scaling->skip < n ? scaling->skip : n);
        listed[2 * r + 1] = at += n;
    }
    int failed = work_upload(work, listed, 2 * (uint64_t)batch->n_rows * sizeof *listed, &ranges,
                             error);
    free(listed);
    struct row_sums_params sums = {
        .x = value,
        .weights = dots.dst,
        .ranges = ranges,
        .width = view->width,
        .stride = work->d_stride,
    };
    return failed ||
                   work_readback_floats(work, batch->n_rows * view->width, scaling->to, &sums.dst,
                                        error) ||
                   op_row_sums(&work->model->ops, &sums, batch->n_rows, error)
               ? -1
               : 0;
}

int site_visit_backward(struct run_work *work, const struct site_view *view, struct error *error) {
    const struct edit_list *list = work->chunk.batch->edits;
    const struct run_capture *capture = capture_find(work->chunk.batch, view->site, view->layer);
    const struct run_scaling *scaling = tape_scaling(work, view->site, view->layer);
    if ((capture && capture_record(work, view, capture, 0, error)) ||
        (scaling && scaling_record(work, view, scaling, error)))
        return -1;
    uint32_t capacity = 0;
    for (const struct edit *edit = edit_first(list, view->site, view->layer); edit;
         edit = edit_next(list, edit))
        capacity++;
    if (capacity == 0)
        return 0;
    const struct edit **firsts = malloc((capacity + 1) * sizeof *firsts);
    struct edit_entry *entries = malloc((view->n_tokens + 1) * sizeof *entries);
    int failed = !firsts || !entries ? error_set(error, ERROR_MEMORY, "out of memory for edits")
                                     : edits_backward(work, view, firsts, entries, error);
    free(firsts);
    free(entries);
    return failed ? -1 : 0;
}
