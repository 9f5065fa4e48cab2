/* Fills in errors and adds context to their messages. */
#include "error.h"

#include <stdio.h>
#include <string.h>

int error_set_at(struct error *error, int kind, const char *file, int line, const char *format,
                 ...) {
    if (!error)
        return -1;
    va_list arguments;
    va_start(arguments, format);
    int written = vsnprintf(error->message, sizeof error->message, format, arguments);
    va_end(arguments);
    if (written < 0)
        strcpy(error->message, "an error whose message could not be formatted");
    error->kind = kind;
    error->file = file;
    error->line = line;
    return -1;
}

int error_add_context(struct error *error, const char *format, ...) {
    if (!error)
        return -1;
    char context[sizeof error->message];
    va_list arguments;
    va_start(arguments, format);
    int written = vsnprintf(context, sizeof context, format, arguments);
    va_end(arguments);
    if (written < 0)
        return -1; /* keep the first message rather than lose it */
    size_t length = strlen(context);
    size_t capacity = sizeof error->message - 1;
    if (length + 2 > capacity)
        return -1; /* the first message matters more, and nothing of it would be left */
    size_t kept = strlen(error->message);
    if (kept > capacity - length - 2)
        kept = capacity - length - 2;
    memmove(error->message + length + 2, error->message, kept);
    memcpy(error->message, context, length);
    memcpy(error->message + length, ": ", 2);
    error->message[length + 2 + kept] = '\0';
    return -1;
}
