#include "parallel.h"

#include <dlfcn.h>
#include <link.h>
#include <pthread.h>
#include <string.h>

namespace fastgen {
namespace {

struct Runtime {
    void (*fork_call)(void (*)(void*), void*, unsigned, unsigned) = nullptr;  // GOMP_parallel
    int (*thread_index)() = nullptr;
    int (*team_size)() = nullptr;
    int (*in_parallel)() = nullptr;
    char name[256] = "serial";
};

Runtime runtime;
bool forked = false;

int use_if_openmp(dl_phdr_info* info, size_t, void*) {
    const char* slash = strrchr(info->dlpi_name, '/');
    const char* file = slash ? slash + 1 : info->dlpi_name;
    if (strncmp(file, "libgomp", 7) != 0 && strncmp(file, "libomp", 6) != 0 &&
        strncmp(file, "libiomp5", 8) != 0)
        return 0;
    void* library = dlopen(info->dlpi_name, RTLD_NOW | RTLD_NOLOAD);
    if (!library) return 0;
    Runtime found;
    found.fork_call = reinterpret_cast<decltype(found.fork_call)>(dlsym(library, "GOMP_parallel"));
    found.thread_index = reinterpret_cast<int (*)()>(dlsym(library, "omp_get_thread_num"));
    found.team_size = reinterpret_cast<int (*)()>(dlsym(library, "omp_get_num_threads"));
    found.in_parallel = reinterpret_cast<int (*)()>(dlsym(library, "omp_in_parallel"));
    if (!found.fork_call || !found.thread_index || !found.team_size || !found.in_parallel) return 0;
    strncpy(found.name, file, sizeof found.name - 1);
    runtime = found;
    return 1;
}

const bool ready = [] {
    dl_iterate_phdr(use_if_openmp, nullptr);
    pthread_atfork(nullptr, nullptr, [] { forked = true; });
    return true;
}();

struct Team {
    int64_t count;
    void (*body)(void*, int64_t, int64_t);
    void* context;
};

void run_member(void* argument) {
    const Team& team = *static_cast<const Team*>(argument);
    const int64_t team_size = runtime.team_size();
    const int64_t members = team_size < team.count ? team_size : team.count;
    const int64_t member = runtime.thread_index();
    if (member >= members) return;
    const int64_t begin = team.count * member / members;
    const int64_t end = team.count * (member + 1) / members;
    if (begin < end) team.body(team.context, begin, end);
}

}  // namespace

void parallel_for(int64_t count, int threads, void (*body)(void*, int64_t, int64_t),
                  void* context) {
    if (count <= 0) return;
    // The whole team even for few items: a team that changes its size makes and ends threads.
    if (threads <= 1 || count == 1 || forked || !runtime.fork_call || runtime.in_parallel()) {
        body(context, 0, count);
        return;
    }
    Team team{count, body, context};
    runtime.fork_call(run_member, &team, unsigned(threads), 0);
}

const char* parallel_runtime() { return runtime.name; }

}  // namespace fastgen
