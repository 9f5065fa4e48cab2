/* Edits as plain data, and which tokens they touch. The caller builds them before a run. */
#ifndef VKSTEER_EDITS_H
#define VKSTEER_EDITS_H

#include <stddef.h>
#include <stdint.h>

#include "base/error.h"

/* One edit of one row (row -1: of every row) at one site. It selects the tokens at positions start,
 * start + step_pos, ... below stop, or at n_positions listed ones. The operand of the i-th selected
 * token and j-th selected head begins at float operand + i * pos_step + j * head_step; its floats
 * are `step` apart. */
struct edit {
    int32_t site, layer, row;
    uint32_t kind; /* EDIT_* of params.h */
    uint32_t start, stop, step_pos;
    /* into edit_list.positions; n_positions = UINT32_MAX: the slice */
    uint32_t first_position, n_positions;
    uint32_t first_head, n_heads; /* into edit_list.heads */
    uint64_t operand;             /* first float in edit_list.operands */
    uint32_t pos_step, head_step, step;
    float coefficient;
    /* the next edit of this site and layer, -1: none; filled by edit_list_index */
    int32_t next;
};

struct edit_list {
    struct edit *edits;
    uint32_t n_edits;
    const uint32_t *positions, *heads;
    uint32_t n_positions, n_heads;
    uint64_t operand_address; /* device address of the operands */
    uint64_t n_operands;      /* floats there */
    int32_t *first;           /* [n_sites * n_layers] head of each chain; owned */
    uint32_t n_sites, n_layers;
};

/* Checks every edit against these counts, and chains edits by site and layer, in order. That
 * operands are long enough is checked when an edit is applied (visit.c). */
int edit_list_index(struct edit_list *list, uint32_t n_sites, uint32_t n_layers, uint32_t n_rows,
                    struct error *error);
void edit_list_clear(struct edit_list *list);
/* The first edit at a site, or NULL. */
const struct edit *edit_first(const struct edit_list *list, int site, int layer);
const struct edit *edit_next(const struct edit_list *list, const struct edit *edit);
/* Does the edit select position `pos` of row `row`? Then *ordinal is the number of selected tokens
 * before it. */
int edit_touches(const struct edit_list *list, const struct edit *edit, uint32_t row, uint32_t pos,
                 uint32_t *ordinal);
/* How many positions from `pos` on the edit treats alike, with the same operand or not at all; at
 * least 1. */
uint32_t edit_alike(const struct edit_list *list, const struct edit *edit, uint32_t row,
                    uint32_t pos);

#endif
