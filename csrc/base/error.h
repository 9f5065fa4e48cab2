/* How every function of the engine reports a failure.
 *
 * A function that can fail returns 0 or -1 and takes a `struct error *` as its last argument. The
 * error is filled where the failure happens, so that the message can name the offending value;
 * callers only pass it on. csrc/python turns the kind into a Python exception. The struct is plain
 * data: it owns nothing and needs no clean-up. */
#ifndef VKSTEER_BASE_ERROR_H
#define VKSTEER_BASE_ERROR_H

#include <stdarg.h>

enum error_kind {
    ERROR_NONE = 0,
    ERROR_DEVICE,     /* vksteer.DeviceError: no driver, lost device, out of device memory */
    ERROR_MODEL,      /* vksteer.ModelError: a model file or its configuration is invalid */
    ERROR_VALUE,      /* ValueError: an argument's value */
    ERROR_TYPE,       /* TypeError: an argument's type */
    ERROR_KEY,        /* KeyError: an unknown site or name */
    ERROR_MEMORY,     /* MemoryError: host memory */
    ERROR_INTERRUPTED /* KeyboardInterrupt: Ctrl-C during a wait */
};

struct error {
    int kind;          /* enum error_kind; ERROR_NONE while nothing has failed */
    char message[512]; /* always terminated; a longer message is cut */
    const char *file;  /* source file and line of the failure; static storage */
    int line;
};

#if defined(__GNUC__)
#define ERROR_PRINTF(format_index, first_argument) \
    __attribute__((format(printf, format_index, first_argument)))
#else
#define ERROR_PRINTF(format_index, first_argument)
#endif

/* Fills `error` from a printf format and returns -1, so that `return error_set(...)` reports the
 * failure. NULL is allowed for a caller that needs no message. */
#define error_set(error, kind, ...) error_set_at((error), (kind), __FILE__, __LINE__, __VA_ARGS__)

int error_set_at(struct error *error, int kind, const char *file, int line, const char *format, ...)
    ERROR_PRINTF(5, 6);

/* Puts "context: " before the message of an error that is set; kind, file and line stay those of
 * the first failure. A message that becomes too long is cut at its end. Returns -1. */
int error_add_context(struct error *error, const char *format, ...) ERROR_PRINTF(2, 3);

/* Passes a failure on: the caller returns -1, and the error is filled already. */
#define RUN(call) \
    do { \
        if (call) \
            return -1; \
    } while (0)

#endif
