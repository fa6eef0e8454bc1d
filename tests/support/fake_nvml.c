/* A driver library for machines without a GPU: NVML's ABI (nvml.h), answered from a text file.
 *
 * The file named by FAKE_NVML_STATE is read again at every call, so a test moves the "GPU" by rewriting it:
 *
 *   driver VERSION
 *   gpu UUID TOTAL USED NAME...         bytes; the n-th line is the GPU with index n
 *   mig GPU UUID TOTAL USED NAME...     an instance of a GPU in MIG mode, after all gpu lines; counted on with them
 *   process GPU LIST PID BYTES|NA       LIST: C compute, G graphics, M MPS
 *   processes FOLDER                    each file in it is a process of GPU 0 that runs: its PID, holding BYTES, used as well
 *   account GPU PID BYTES               accounting mode is on, and this was a process's largest use
 *   fail FUNCTION CODE                  that function returns CODE
 *   growing N                           the first N filled lists turn out too short
 *
 * Without the file the driver is not loaded. -DBEFORE_510 leaves out the _v3 lists, as drivers before 510 do.
 */
#include <dirent.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { OK = 0, UNINITIALIZED = 1, INVALID = 2, NOT_FOUND = 6, TOO_SMALL = 7, NOT_LOADED = 9 };
enum { GPUS = 8, PROCESSES = 64 };
typedef unsigned long long bytes;
typedef struct { unsigned pid; bytes used; unsigned gpu_instance, compute_instance; } process_info; /* nvmlProcessInfo_v2_t */
typedef struct { bytes total, free, used; } memory_info;                                             /* nvmlMemory_t */
typedef struct { unsigned gpu_utilization, memory_utilization; bytes most, time, start; unsigned running, reserved[5]; } accounting;
typedef struct { int parent; char uuid[96], name[96]; bytes total, used; } gpu;                      /* parent: -1, a whole GPU */
typedef struct { int gpu; char list; unsigned pid; bytes used; } process;

static struct {
    char driver[64];
    int gpus, whole, processes, accounts, growing;
    gpu gpu[GPUS];
    process process[PROCESSES], account[PROCESSES];
} state;
static int initialised, grown;

static void read_folder(const char *folder) {
    DIR *opened = opendir(folder);
    if (!opened) return;
    for (struct dirent *entry; (entry = readdir(opened));) {
        char path[768];
        process *p = &state.process[state.processes % PROCESSES];
        if (sscanf(entry->d_name, "%u", &p->pid) != 1 || kill((int)p->pid, 0)) continue;
        snprintf(path, sizeof path, "%s/%s", folder, entry->d_name);
        FILE *file = fopen(path, "r");
        if (file && fscanf(file, "%llu", &p->used) == 1) {
            p->gpu = 0;
            p->list = 'C';
            state.gpu[0].used += p->used;
            state.processes++;
        }
        if (file) fclose(file);
    }
    closedir(opened);
}

static int enter(const char *function) {
    const char *path = getenv("FAKE_NVML_STATE");
    FILE *file = path ? fopen(path, "r") : NULL;
    char line[512], word[128], size[32], folder[256] = "";
    int code, failure = OK;
    if (!file) return NOT_LOADED;
    memset(&state, 0, sizeof state);
    while (fgets(line, sizeof line, file)) {
        gpu *g = &state.gpu[state.gpus % GPUS];
        process *p = &state.process[state.processes % PROCESSES];
        if (sscanf(line, "driver %63s", state.driver) == 1) continue;
        if (sscanf(line, "growing %d", &state.growing) == 1) continue;
        process *a = &state.account[state.accounts % PROCESSES];
        if (sscanf(line, "gpu %95s %llu %llu %95[^\n]", g->uuid, &g->total, &g->used, g->name) == 4) {
            g->parent = -1;
            state.whole = ++state.gpus;
        }
        if (sscanf(line, "mig %d %95s %llu %llu %95[^\n]", &g->parent, g->uuid, &g->total, &g->used, g->name) == 5) state.gpus++;
        if (sscanf(line, "account %d %u %llu", &a->gpu, &a->pid, &a->used) == 3) state.accounts++;
        if (sscanf(line, "process %d %c %u %31s", &p->gpu, &p->list, &p->pid, size) == 4) {
            p->used = strcmp(size, "NA") ? strtoull(size, NULL, 10) : ~0ULL;
            state.processes++;
        }
        if (sscanf(line, "processes %255s", folder) == 1) continue;
        if (sscanf(line, "fail %127s %d", word, &code) == 2 && !strcmp(word, function)) failure = code;
    }
    fclose(file);
    read_folder(folder);
    if (!state.growing) grown = 0;
    if (failure) return failure;
    return initialised || !strncmp(function, "nvmlInit", 8) ? OK : UNINITIALIZED;
}

#define ENTER() do { int code_ = enter(__func__); if (code_) return code_; } while (0)
/* A handle is the index plus one, so that no handle is NULL. */
#define GPU_OF(handle) (&state.gpu[(size_t)(handle) - 1])
#define TEXT(target, length, text) do { \
    if (strlen(text) >= (length)) return TOO_SMALL; \
    strcpy(target, text); return OK; } while (0)

int nvmlInitWithFlags(unsigned flags) { (void)flags; ENTER(); initialised++; return OK; }
int nvmlShutdown(void) { if (!initialised) return UNINITIALIZED; initialised--; return OK; }
const char *nvmlErrorString(int code) { return code == 15 ? "GPU is lost" : code == 3 ? "Not Supported" : "NVML error"; }
int nvmlSystemGetDriverVersion(char *text, unsigned length) { ENTER(); TEXT(text, length, state.driver); }
int nvmlDeviceGetCount_v2(unsigned *count) { ENTER(); *count = (unsigned)state.whole; return OK; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) {
    ENTER();
    if ((int)index >= state.whole) return INVALID;
    *handle = (void *)(size_t)(index + 1);
    return OK;
}
int nvmlDeviceGetHandleByUUID(const char *uuid, void **handle) {
    ENTER();
    for (int i = 0; i < state.gpus; i++)
        if (!strcmp(state.gpu[i].uuid, uuid)) { *handle = (void *)(size_t)(i + 1); return OK; }
    return NOT_FOUND;
}
int nvmlDeviceGetName(void *handle, char *text, unsigned length) { ENTER(); TEXT(text, length, GPU_OF(handle)->name); }
int nvmlDeviceGetUUID(void *handle, char *text, unsigned length) { ENTER(); TEXT(text, length, GPU_OF(handle)->uuid); }
int nvmlDeviceGetMemoryInfo(void *handle, memory_info *memory) {
    ENTER();
    gpu *g = GPU_OF(handle);
    *memory = (memory_info){g->total, g->total - g->used, g->used};
    return OK;
}

static int instances(void *handle) {
    int found = 0;
    for (int i = 0; i < state.gpus; i++) found += state.gpu[i].parent == (int)((size_t)handle - 1);
    return found;
}

int nvmlDeviceGetMigMode(void *handle, unsigned *current, unsigned *pending) {
    ENTER();
    *current = *pending = instances(handle) > 0;
    return OK;
}
int nvmlDeviceGetMaxMigDeviceCount(void *handle, unsigned *count) { (void)handle; ENTER(); *count = 7; return OK; }
int nvmlDeviceGetMigDeviceHandleByIndex(void *handle, unsigned index, void **instance) {
    ENTER();
    if ((int)index >= instances(handle)) return NOT_FOUND;
    for (int i = 0, seen = 0; i < state.gpus; i++)
        if (state.gpu[i].parent == (int)((size_t)handle - 1) && seen++ == (int)index) *instance = (void *)(size_t)(i + 1);
    return OK;
}
int nvmlDeviceGetAccountingMode(void *handle, unsigned *mode) { (void)handle; ENTER(); *mode = state.accounts > 0; return OK; }
int nvmlDeviceGetAccountingStats(void *handle, unsigned pid, accounting *stats) {
    ENTER();
    for (int i = 0; i < state.accounts; i++)
        if (state.account[i].pid == pid && state.account[i].gpu == (int)((size_t)handle - 1)) {
            memset(stats, 0, sizeof *stats);
            stats->most = state.account[i].used;
            return OK;
        }
    return NOT_FOUND;
}

static int list(void *handle, char kind, unsigned *count, process_info *out) {
    unsigned room = out ? *count : 0, found = 0;
    for (int i = 0; i < state.processes; i++) {
        process *p = &state.process[i];
        if (p->gpu != (int)((size_t)handle - 1) || p->list != kind) continue;
        if (found < room) out[found] = (process_info){p->pid, p->used, ~0u, ~0u};
        found++;
    }
    *count = found;
    if (found > room) return TOO_SMALL;
    if (out && grown < state.growing) { grown++; return TOO_SMALL; }
    return OK;
}

#define LIST(FUNCTION, KIND) \
    int FUNCTION(void *handle, unsigned *count, process_info *out) { ENTER(); return list(handle, KIND, count, out); }
LIST(nvmlDeviceGetComputeRunningProcesses_v2, 'C')
LIST(nvmlDeviceGetGraphicsRunningProcesses_v2, 'G')
LIST(nvmlDeviceGetMPSComputeRunningProcesses_v2, 'M')
#ifndef BEFORE_510
LIST(nvmlDeviceGetComputeRunningProcesses_v3, 'C')
LIST(nvmlDeviceGetGraphicsRunningProcesses_v3, 'G')
LIST(nvmlDeviceGetMPSComputeRunningProcesses_v3, 'M')
#endif
