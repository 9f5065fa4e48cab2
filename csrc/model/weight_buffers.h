/* Weight buffers: a few large device buffers that weights are cut from, filled once through two
 * staging buffers. Used by model.c and weights.c. */
#ifndef VKSTEER_MODEL_WEIGHT_BUFFERS_H
#define VKSTEER_MODEL_WEIGHT_BUFFERS_H

#include "model/model.h"

/* Checks that the device has `bytes` free for the weights (ERROR_DEVICE if not) and makes the
 * staging buffers. */
int weight_buffers_reserve(struct model *model, uint64_t bytes, struct error *error);
/* Frees the weight buffers, and the staging buffers if they still exist. */
void weight_buffers_destroy(struct model *model);
/* Waits for the copies and frees the staging buffers. No weight can be loaded afterwards. */
int weight_buffers_finish(struct model *model, struct error *error);
/* `bytes` of device memory at *offset of *buffer, cut from the current weight buffer or a new one.
 * The model owns the buffer. */
int weight_buffer_cut(struct model *model, uint64_t bytes, struct gpu_buffer **buffer,
                      uint64_t *offset, struct error *error);
/* The weight buffer that an address lies in, and where. */
int weight_buffer_at(const struct model *model, uint64_t address, struct gpu_buffer **buffer,
                     uint64_t *offset, struct error *error);
/* Bytes of a staging buffer: 32 MiB, less where the device has little memory. */
uint64_t staging_bytes(const struct model *model);
/* The staging buffer to fill next, of staging_bytes. The copy that used it last is finished.
 * ERROR_MODEL after weight_buffers_finish. */
int staging_buffer_next(struct model *model, struct gpu_buffer **out, struct error *error);

/* layout.c: checks every fact and their relations; ERROR_MODEL names the first that is out of
 * range. */
int model_facts_check(const struct model_facts *f, struct error *error);

#endif
