/* Each table holds the checks of one area; features.c runs them all. */
#ifndef HULL_FEATURES_H
#define HULL_FEATURES_H

#include "guest.h"

extern const struct check filesystem_checks[], container_checks[], network_checks[], memory_checks[], process_checks[];
extern const int filesystem_count, container_count, network_count, memory_count, process_count;

/* A new file with this content in /tmp; its descriptor, or -1. The path goes to `path` (at least 64 bytes). */
int temporary_file(char *path, const char *content);
/* A new folder in /tmp; static storage. */
const char *temporary_folder(void);

#endif
