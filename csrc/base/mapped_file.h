/* The bytes of a file, read-only and without a copy.
 *
 * The mapping is private. The file's size is taken from the open file descriptor, and every range
 * is checked against it. Access raises SIGBUS if another process truncates the file while it is
 * mapped; no check can prevent that. Weights are therefore copied to the device soon after opening,
 * and model files should be replaced by renaming, never in place. POSIX only. */
#ifndef VKSTEER_BASE_MAPPED_FILE_H
#define VKSTEER_BASE_MAPPED_FILE_H

#include <stddef.h>
#include <stdint.h>

#include "error.h"

struct mapped_file {
    const uint8_t *bytes; /* [size], owned by the mapping; NULL for an empty file */
    size_t size;
    char *path; /* owned copy, for messages */
};

/* Maps a regular file; an empty one has size 0. ERROR_MODEL for directories, devices, pipes and
 * files that cannot be opened. After a failure *file is zeroed and need not be closed. */
int mapped_file_open(struct mapped_file *file, const char *path, struct error *error);

/* Unmaps the file, after which pointers from mapped_file_range are invalid. NULL and a zeroed
 * struct are allowed; calling it again does nothing. */
void mapped_file_close(struct mapped_file *file);

/* Borrows bytes offset .. offset + length of the file until it is closed; they are not aligned.
 * ERROR_MODEL if the range does not lie in the file. With length 0, *pointer must not be read. */
int mapped_file_range(const struct mapped_file *file, uint64_t offset, uint64_t length,
                      const uint8_t **pointer, struct error *error);

#endif
