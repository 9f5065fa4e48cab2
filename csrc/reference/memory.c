/* The twins' memory: every access checked. */
#include "reference/reference.h"

/* The buffer that `address` lies in, and the item there; NULL where there is none. */
static struct twin_buffer *find(struct twin_memory *memory, uint64_t address, uint64_t index,
                                uint64_t *item) {
    uint64_t number = address >> TWIN_SHIFT;
    *item = (address & ((UINT64_C(1) << TWIN_SHIFT) - 1)) / 4 + index;
    if (number == 0 || number > memory->n_buffers) {
        twin_fail(memory, "an address that is needed is absent");
        return NULL;
    }
    struct twin_buffer *buffer = &memory->buffers[number - 1];
    if (*item >= buffer->n) {
        twin_fail(memory, "item %llu of %s, which has %llu", (unsigned long long)*item,
                  buffer->name, (unsigned long long)buffer->n);
        return NULL;
    }
    return buffer;
}

double *twin_float(struct twin_memory *memory, uint64_t address, uint64_t index) {
    uint64_t item;
    struct twin_buffer *buffer = find(memory, address, index, &item);
    if (buffer && buffer->floats)
        return &buffer->floats[item];
    if (buffer)
        twin_fail(memory, "%s holds words where floats are wanted", buffer->name);
    return &memory->no_float;
}

uint32_t twin_word(struct twin_memory *memory, uint64_t address, uint64_t index) {
    uint64_t item;
    struct twin_buffer *buffer = find(memory, address, index, &item);
    if (buffer && buffer->words)
        return buffer->words[item];
    if (buffer)
        twin_fail(memory, "%s holds floats where words are wanted", buffer->name);
    return 0;
}

struct token_meta twin_token(struct twin_memory *memory, uint64_t tokens, uint64_t index) {
    uint64_t at = index * (sizeof(struct token_meta) / 4);
    return (struct token_meta){
        .id = twin_word(memory, tokens, at),
        .pos = twin_word(memory, tokens, at + 1),
        .slot = twin_word(memory, tokens, at + 2),
        .q_token = twin_word(memory, tokens, at + 3),
        .k_slot = twin_word(memory, tokens, at + 4),
        .v_slot = twin_word(memory, tokens, at + 5),
        .row = twin_word(memory, tokens, at + 6),
        .row_end = twin_word(memory, tokens, at + 7),
    };
}
