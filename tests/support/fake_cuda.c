/* A CUDA driver for machines without a GPU: contexts and allocations that are only numbers, which the driver library of
 * fake_nvml.c shows. FAKE_CUDA_PROCESSES names the folder in which each process keeps a file with what it holds, in bytes.
 */
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

enum { OK = 0, INVALID = 1, OUT_OF_MEMORY = 2, NO_DEVICE = 100 };
typedef unsigned long long bytes;
static const bytes CONTEXT = 300ULL << 20, GRAIN = 2ULL << 20, TOTAL = 24ULL << 30;
static bytes held, sizes[64];
static char path[512];

static void keep(void) {
    char part[544];
    snprintf(part, sizeof part, "%s.part", path);
    FILE *file = fopen(part, "w");
    if (!file) return;
    fprintf(file, "%llu\n", held);
    fclose(file);
    rename(part, path);
}

static void leave(void) { if (*path) unlink(path); }

int cuInit(unsigned flags) {
    const char *folder = getenv("FAKE_CUDA_PROCESSES");
    if (!folder || flags) return NO_DEVICE;
    snprintf(path, sizeof path, "%s/%d", folder, (int)getpid());
    atexit(leave);
    return OK;
}
int cuDriverGetVersion(int *version) { *version = 13000; return OK; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return ordinal ? NO_DEVICE : OK; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)(size_t)(device + 1); held += CONTEXT; keep(); return OK; }
int cuCtxSetCurrent(void *context) { return context ? OK : INVALID; }
int cuMemGetInfo_v2(size_t *free_bytes, size_t *total) { *free_bytes = TOTAL - held; *total = TOTAL; return OK; }
int cuMemAlloc_v2(bytes *block, size_t size) {
    bytes taken = (size + GRAIN - 1) / GRAIN * GRAIN;
    if (held + taken > TOTAL) return OUT_OF_MEMORY;
    for (int i = 0; i < 64; i++)
        if (!sizes[i]) {
            sizes[i] = taken, held += taken, *block = (bytes)i + 1;
            keep();
            return OK;
        }
    return OUT_OF_MEMORY;
}
int cuMemFree_v2(bytes block) {
    if (block < 1 || block > 64 || !sizes[block - 1]) return INVALID;
    held -= sizes[block - 1], sizes[block - 1] = 0;
    keep();
    return OK;
}
