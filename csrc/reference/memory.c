/* The memory of the references, in which every access is checked. */
#include "reference/reference.h"

/* The buffer that `address` lies in, and the item there; NULL where there is none. */
static struct reference_buffer *find(struct reference_memory *memory, uint64_t address,
                                     uint64_t index, uint64_t *item) {
    uint64_t number = address >> REFERENCE_SHIFT;
    *item = (address & ((UINT64_C(1) << REFERENCE_SHIFT) - 1)) / 4 + index;
    if (number == 0 || number > memory->n_buffers) {
        reference_fail(memory, "an address that is needed is absent");
        return NULL;
    }
    struct reference_buffer *buffer = &memory->buffers[number - 1];
    if (*item >= buffer->n) {
        reference_fail(memory, "item %llu of %s, which has %llu", (unsigned long long)*item,
                       buffer->name, (unsigned long long)buffer->n);
        return NULL;
    }
    return buffer;
}

double *reference_float(struct reference_memory *memory, uint64_t address, uint64_t index) {
    uint64_t item;
    struct reference_buffer *buffer = find(memory, address, index, &item);
    if (buffer && buffer->floats)
        return &buffer->floats[item];
    if (buffer)
        reference_fail(memory, "%s holds words where floats are wanted", buffer->name);
    return &memory->no_float;
}

uint32_t reference_word(struct reference_memory *memory, uint64_t address, uint64_t index) {
    uint64_t item;
    struct reference_buffer *buffer = find(memory, address, index, &item);
    if (buffer && buffer->words)
        return buffer->words[item];
    if (buffer)
        reference_fail(memory, "%s holds floats where words are wanted", buffer->name);
    return 0;
}

struct token_meta reference_token(struct reference_memory *memory, uint64_t tokens,
                                  uint64_t index) {
    uint64_t at = index * (sizeof(struct token_meta) / 4);
    return (struct token_meta){
        .id = reference_word(memory, tokens, at),
        .pos = reference_word(memory, tokens, at + 1),
        .slot = reference_word(memory, tokens, at + 2),
        .q_token = reference_word(memory, tokens, at + 3),
        .k_slot = reference_word(memory, tokens, at + 4),
        .v_slot = reference_word(memory, tokens, at + 5),
        .row = reference_word(memory, tokens, at + 6),
        .row_end = reference_word(memory, tokens, at + 7),
        .angle = reference_word(memory, tokens, at + 8),
    };
}
