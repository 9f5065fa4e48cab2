/* Device memory that weights are cut from: a few large buffers, filled once through two staging
 * buffers. Used by model.c and weights.c. */
#ifndef VKSTEER_MODEL_BLOCKS_H
#define VKSTEER_MODEL_BLOCKS_H

#include "model/model.h"

#define STAGING_BYTES (UINT64_C(32) << 20)

int model_blocks_reserve(struct model *model, uint64_t bytes, struct error *error);
void model_blocks_destroy(struct model *model);
int model_blocks_finish(struct model *model, struct error *error);
int model_block_cut(struct model *model, uint64_t bytes, struct gpu_buffer **buffer,
                    uint64_t *offset, struct error *error);
int model_staging_next(struct model *model, struct gpu_buffer **out, struct error *error);

/* layout.c */
int model_facts_check(const struct model_facts *f, struct error *error);

#endif
