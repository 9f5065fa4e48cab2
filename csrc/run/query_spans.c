/* Attention in spans of queries: scores of a whole chunk may be larger than the scratch memory. */
#include "run/work.h"

uint32_t query_span_most(const struct run_work *work, uint64_t query_bytes) {
    uint64_t most = work->scratch / query_bytes;
    if (most > work->chunk.n_tokens)
        most = work->chunk.n_tokens;
    return most < OP_TILE ? OP_TILE : (uint32_t)most;
}

int query_span_next(const struct query_tile *tiles, uint32_t n_tiles, uint32_t most,
                    struct query_span *span) {
    uint32_t tile = span->end, end = tile + 1;
    if (tile >= n_tiles)
        return 0;
    span->tile = tile;
    span->first = tiles[tile].first;
    while (end < n_tiles && tiles[end].first + tiles[end].count - span->first <= most)
        end++;
    span->end = end;
    span->n = tiles[end - 1].first + tiles[end - 1].count - span->first;
    return 1;
}
