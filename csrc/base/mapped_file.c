#define _DEFAULT_SOURCE /* madvise */
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
    /* Written so that nothing can overflow: offset <= size first, then length
     * against what is left. */
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

static void advise(const struct mapped_file *file, uint64_t offset, uint64_t length, int advice) {
    if (!file->bytes || offset > file->size || length > file->size - offset || length == 0)
        return;
    long page = sysconf(_SC_PAGESIZE);
    if (page <= 0)
        return;
    /* madvise wants a page boundary; the mapping itself begins on one. Whole pages
     * only for DONTNEED would be tidier, but a clean private file mapping is simply
     * read again when touched. */
    size_t start = (size_t)offset - (size_t)offset % (size_t)page;
    (void)madvise((void *)(uintptr_t)(file->bytes + start), (size_t)(offset + length) - start,
                  advice);
}

void mapped_file_will_read(const struct mapped_file *file, uint64_t offset, uint64_t length) {
    advise(file, offset, length, MADV_WILLNEED);
}

void mapped_file_done_reading(const struct mapped_file *file, uint64_t offset, uint64_t length) {
    advise(file, offset, length, MADV_DONTNEED);
}
