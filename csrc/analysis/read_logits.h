/* What metrics read of the final logits of many runs of the same tokens: two logits, numbers of the
 * whole distribution, or the logits themselves. The unembedding is only multiplied where it is
 * read: two of its rows for each token, or all of it for a tile of a few tokens. */
#ifndef VKSTEER_ANALYSIS_READ_LOGITS_H
#define VKSTEER_ANALYSIS_READ_LOGITS_H

#include "run/work.h"

/* What to read, for E runs. Host arrays; outputs that are NULL are not computed. */
struct read_request {
    uint32_t n;
    const uint32_t *tokens;         /* [n] packed indices, ascending (not used by read_measure) */
    float softcap;                  /* of all logits; 0: none */
    const uint32_t *a, *b;          /* [n] tokens of the two logits */
    float *pairs;                   /* [E, n, 2] */
    const float *reference, *other; /* [n, D] normed final rows of two other runs, on the host */
    const uint32_t *targets;        /* [n] */
    /* [E, n, 4] KL(reference || x), KL(other || x), log p(target), greedy token */
    float *distributions;
    float *logits; /* [E, n, V] */
};

/* Device buffers of the functions below, zero at first and grown when needed. */
struct read_memory {
    struct gpu_buffer *rows, *logits, *reference;
};
/* Frees the buffers; calling it again does nothing. */
void read_memory_free(struct read_memory *memory);
/* Device bytes of the tiles; read_pairs needs two rows of width D for each token on top. */
uint64_t read_bytes(const struct model_facts *facts);
/* Tokens that read_distributions and read_logits accept at once. */
uint32_t read_tile(const struct model_facts *facts);

/* These record the work for tokens [first, first + n) of the request, of n_runs runs whose final
 * rows after norm and gain lie at `normed` [n_runs, n, d_stride]. The values are in the request's
 * arrays after work_readback_drain. */
/* request->pairs: the logits of tokens a and b. */
int read_pairs(struct run_work *work, struct read_memory *memory, const struct read_request *read,
               uint32_t first, uint32_t n, uint64_t normed, uint32_t n_runs, struct error *error);
/* request->distributions, for at most read_tile tokens. */
int read_distributions(struct run_work *work, struct read_memory *memory,
                       const struct read_request *read, uint32_t first, uint32_t n, uint64_t normed,
                       uint32_t n_runs, struct error *error);
/* request->logits, for at most read_tile tokens; `memory` is not used. */
int read_logits(struct run_work *work, struct read_memory *memory, const struct read_request *read,
                uint32_t first, uint32_t n, uint64_t normed, uint32_t n_runs, struct error *error);
/* Reads pairs and distributions of normed rows in host memory, [n_runs, n, D]; bit-identical to
 * what a circuit with these rows gets. Waits for the device. */
int read_measure(struct run_work *work, const struct read_request *read, const float *rows,
                 uint32_t n_runs, struct error *error);

#endif
