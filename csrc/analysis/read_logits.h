/* What metrics read of final logits, of many runs of the same tokens: two logits, or numbers of the
 * whole distribution. The unembedding is only evaluated where it is read: two of its rows a token,
 * or tiles of a few tokens. */
#ifndef VKSTEER_READ_LOGITS_H
#define VKSTEER_READ_LOGITS_H

#include "run/work.h"

/* E runs. Outputs that are NULL are not asked for. */
struct read_request {
    uint32_t n;
    const uint32_t *tokens;         /* [n] packed indices, ascending (not used by read_measure) */
    float softcap;                  /* on all logits; 0: none */
    const uint32_t *a, *b;          /* [n] tokens of the two logits */
    float *pairs;                   /* [E, n, 2] */
    const float *reference, *other; /* [n, D] normed final rows of two other runs, on the host */
    const uint32_t *targets;        /* [n] */
    /* [E, n, 4] KL(reference || x), KL(other || x), log p(target), greedy token */
    float *whole;
    float *logits; /* [E, n, V] */
};

struct read_memory {
    struct gpu_buffer *rows, *logits, *reference;
}; /* grown when asked for */
void read_memory_free(struct read_memory *memory);
/* of the tiles; two rows of the unembedding a token come on top */
uint64_t read_bytes(const struct model_facts *facts);
/* tokens of `whole` and `logits` that are read at once */
uint32_t read_tile(const struct model_facts *facts);

/* Tokens [first, first + n) of the request, of n_runs runs whose normed rows lie at `normed`
 * [n_runs, n, d_stride]. n <= read_tile but for pairs. The values are there after
 * work_readback_drain. */
int read_pairs(struct run_work *work, struct read_memory *memory, const struct read_request *read,
               uint32_t first, uint32_t n, uint64_t normed, uint32_t n_runs, struct error *error);
int read_whole(struct run_work *work, struct read_memory *memory, const struct read_request *read,
               uint32_t first, uint32_t n, uint64_t normed, uint32_t n_runs, struct error *error);
int read_logits(struct run_work *work, struct read_memory *memory, const struct read_request *read,
                uint32_t first, uint32_t n, uint64_t normed, uint32_t n_runs, struct error *error);
/* The same of normed rows on the host, [n_runs, n, D]; with the bits that a
 * circuit's rows get. Waits. */
int read_measure(struct run_work *work, const struct read_request *read, const float *rows,
                 uint32_t n_runs, struct error *error);

#endif
