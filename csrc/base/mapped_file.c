/* Files mapped with mmap, see mapped_file.h. */
#define _POSIX_C_SOURCE 200809L
#define _FILE_OFFSET_BITS 64

#include "mapped_file.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

int mapped_file_open(struct mapped_file *file, const char *path, struct error *error) {
    int descriptor = -1;
    struct stat status;

    memset(file, 0, sizeof *file);
    size_t path_bytes = strlen(path) + 1;
    file->path = malloc(path_bytes);
    if (!file->path)
        return error_set(error, ERROR_MEMORY, "no memory for the path of a model file (%zu bytes)",
                         path_bytes);
    memcpy(file->path, path, path_bytes);

    /* O_NONBLOCK: opening a named pipe must not wait for a writer; regular files ignore it. */
    descriptor = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (descriptor < 0) {
        error_set(error, ERROR_MODEL, "cannot open %s: %s", path, strerror(errno));
        goto fail;
    }
    if (fstat(descriptor, &status) != 0) {
        error_set(error, ERROR_MODEL, "cannot read the size of %s: %s", path, strerror(errno));
        goto fail;
    }
    if (!S_ISREG(status.st_mode)) {
        error_set(error, ERROR_MODEL, "%s is %s, not a regular file", path,
                  S_ISDIR(status.st_mode) ? "a directory" : "a device or pipe");
        goto fail;
    }
    if (status.st_size < 0 || (uint64_t)status.st_size > SIZE_MAX) {
        error_set(error, ERROR_MODEL, "%s is too large to map on this machine (%" PRId64 " bytes)",
                  path, (int64_t)status.st_size);
        goto fail;
    }
    file->size = (size_t)status.st_size;
    if (file->size > 0) { /* mmap refuses length 0 */
        void *mapping = mmap(NULL, file->size, PROT_READ, MAP_PRIVATE, descriptor, 0);
        if (mapping == MAP_FAILED) {
            error_set(error, ERROR_MODEL, "cannot map %s (%zu bytes): %s", path, file->size,
                      strerror(errno));
            goto fail;
        }
        file->bytes = mapping;
    }
    close(descriptor); /* the mapping keeps the file alive */
    return 0;

fail:
    if (descriptor >= 0)
        close(descriptor);
    file->size = 0;
    mapped_file_close(file);
    return -1;
}

void mapped_file_close(struct mapped_file *file) {
    if (!file)
        return;
    if (file->bytes)
        munmap((void *)(uintptr_t)file->bytes, file->size);
    free(file->path);
    memset(file, 0, sizeof *file);
}

int mapped_file_range(const struct mapped_file *file, uint64_t offset, uint64_t length,
                      const uint8_t **pointer, struct error *error) {
    *pointer = NULL;
    /* Written so that no sum can overflow. */
    if (offset > file->size || length > file->size - offset)
        return error_set(error, ERROR_MODEL,
                         "bytes %" PRIu64 "+%" PRIu64
                         " lie outside %s, which has %zu bytes; the file is damaged or was "
                         "changed while it was read",
                         offset, length, file->path ? file->path : "a closed file", file->size);
    static const uint8_t nothing[1] = {0};
    *pointer = file->bytes ? file->bytes + offset : nothing;
    return 0;
}
