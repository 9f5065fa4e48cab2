/* mapped_file.h - a file's bytes, read-only, without copying them.
 *
 * The mapping is private and read-only. The size is taken from the open file descriptor when it is
 * mapped, and every later range is checked against it. A file that another process *truncates*
 * while it is mapped raises SIGBUS on access: no check can prevent that, so weights are copied to
 * the device soon after opening and the file is closed again; replace model files by rename, never
 * in place. POSIX only. */
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

/* Maps a regular file. Directories, devices and pipes are refused (ERROR_MODEL); an empty file maps
 * to size 0. On failure *file is zeroed, so closing it is legal. */
int mapped_file_open(struct mapped_file *file, const char *path, struct error *error);

/* Legal on NULL, on a zeroed struct and twice. Pointers from mapped_file_range die with it. */
void mapped_file_close(struct mapped_file *file);

/* Borrows bytes offset .. offset+length of the file; *pointer stays valid until mapped_file_close.
 * A range that does not lie wholly inside the file is ERROR_MODEL; length 0 gives a pointer that
 * must not be read. No alignment is promised. */
int mapped_file_range(const struct mapped_file *file, uint64_t offset, uint64_t length,
                      const uint8_t **pointer, struct error *error);

/* Tells the kernel that a range will be read soon from front to back, or is no longer needed.
 * Hints: they cannot fail. */
void mapped_file_will_read(const struct mapped_file *file, uint64_t offset, uint64_t length);
void mapped_file_done_reading(const struct mapped_file *file, uint64_t offset, uint64_t length);

#endif
