/* Edits checked and indexed (edits.h). */
#include <math.h>
#include <stdlib.h>

#include "run/edits.h"

int edit_list_index(struct edit_list *list, uint32_t n_sites, uint32_t n_layers, uint32_t n_rows,
                    struct error *error) {
    size_t n = (size_t)n_sites * n_layers;
    free(list->first);
    list->first = malloc(2 * n * sizeof *list->first);
    if (!list->first)
        return error_set(error, ERROR_MEMORY, "out of memory for edits");
    int32_t *last = list->first + n;
    for (size_t i = 0; i < 2 * n; i++)
        list->first[i] = -1;
    list->n_sites = n_sites;
    list->n_layers = n_layers;
    for (uint32_t i = 0; i < list->n_edits; i++) {
        struct edit *edit = &list->edits[i];
        if (edit->site < 0 || (uint32_t)edit->site >= n_sites || edit->layer < 0 ||
            (uint32_t)edit->layer >= n_layers)
            return error_set(error, ERROR_VALUE, "edit %u: no site %d in layer %d", i, edit->site,
                             edit->layer);
        if (edit->row < -1 || edit->row >= (int32_t)n_rows)
            return error_set(error, ERROR_VALUE, "edit %u: row %d of %u", i, edit->row, n_rows);
        if (edit->n_positions != UINT32_MAX &&
            (edit->first_position > list->n_positions ||
             edit->n_positions > list->n_positions - edit->first_position))
            return error_set(error, ERROR_VALUE, "edit %u: its positions leave the list", i);
        if (edit->first_head > list->n_heads || edit->n_heads > list->n_heads - edit->first_head ||
            edit->n_heads == 0)
            return error_set(error, ERROR_VALUE, "edit %u: its heads leave the list", i);
        if (edit->operand >= list->n_operands || edit->step_pos == 0 ||
            !isfinite(edit->coefficient))
            return error_set(error, ERROR_VALUE,
                             "edit %u: operand, step or coefficient out of range", i);
        size_t key = (size_t)edit->site * n_layers + (size_t)edit->layer;
        edit->next = -1;
        if (last[key] < 0)
            list->first[key] = (int32_t)i;
        else
            list->edits[last[key]].next = (int32_t)i;
        last[key] = (int32_t)i;
    }
    return 0;
}

void edit_list_clear(struct edit_list *list) {
    free(list->first);
    list->first = NULL;
}

const struct edit *edit_first(const struct edit_list *list, int site, int layer) {
    if (!list || !list->first)
        return NULL;
    int32_t i = list->first[(size_t)site * list->n_layers + (size_t)layer];
    return i < 0 ? NULL : &list->edits[i];
}

const struct edit *edit_next(const struct edit_list *list, const struct edit *edit) {
    return edit->next < 0 ? NULL : &list->edits[edit->next];
}

int edit_touches(const struct edit_list *list, const struct edit *edit, uint32_t row, uint32_t pos,
                 uint32_t *ordinal) {
    if (edit->row >= 0 && (uint32_t)edit->row != row)
        return 0;
    if (edit->n_positions != UINT32_MAX) {
        for (uint32_t i = 0; i < edit->n_positions; i++)
            if (list->positions[edit->first_position + i] == pos) {
                *ordinal = i;
                return 1;
            }
        return 0;
    }
    if (pos < edit->start || pos >= edit->stop || (pos - edit->start) % edit->step_pos)
        return 0;
    *ordinal = (pos - edit->start) / edit->step_pos;
    return 1;
}

uint32_t edit_alike(const struct edit_list *list, const struct edit *edit, uint32_t row,
                    uint32_t pos) {
    uint32_t next = UINT32_MAX; /* the first later position that is treated otherwise */
    if (edit->row >= 0 && (uint32_t)edit->row != row)
        return UINT32_MAX;
    for (uint32_t i = 0; edit->n_positions != UINT32_MAX && i < edit->n_positions; i++) {
        uint32_t listed = list->positions[edit->first_position + i];
        if (listed == pos)
            return 1;
        if (listed > pos && listed < next)
            next = listed;
    }
    if (edit->n_positions != UINT32_MAX || pos >= edit->stop)
        return next - pos;
    if (pos < edit->start)
        return edit->start < edit->stop ? edit->start - pos : UINT32_MAX;
    return edit->step_pos > 1 || edit->pos_step ? 1 : edit->stop - pos;
}
