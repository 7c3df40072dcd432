/* Which CPU does what.
 *
 * On a virtual machine a wake-up across CPUs costs 20 to 80 us, and every change of a page table that another CPU is using costs
 * an interrupt there.  So the fault server, the agent and the loop follow the faulting thread's CPU, and the evict
 * worker keeps to the others.
 */
#define _GNU_SOURCE
#include "pager.h"
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define LOOKS_TO_MOVE 4 /* threads on several CPUs must not make the server hop between them */
#define LOOKS_SPREAD 64  /* for how long one look elsewhere is remembered */
#define LOOK_EVERY_NS 5000000ull /* between looks at where the faulting thread runs: reading it costs about 10 us */

/* Field 39 of /proc/PID/task/TID/stat; -1 if it cannot be read. */
static int cpu_of_thread(int pid, uint32_t thread_id) {
    char path[64], text[1024];
    snprintf(path, sizeof path, "/proc/%d/task/%u/stat", pid, thread_id);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return -1;
    ssize_t length = read(fd, text, sizeof text - 1);
    close(fd);
    if (length <= 0)
        return -1;
    text[length] = 0;
    char *at = strrchr(text, ')'); /* field 2 may hold blanks */
    for (int field = 2; at && field < 39; field++) {
        at = strchr(at, ' ');
        at = at ? at + 1 : NULL;
    }
    return at ? atoi(at) : -1;
}

/* What this process was given, before any of its threads was put anywhere. */
static cpu_set_t given;
static atomic_bool given_known;

static bool get_given(cpu_set_t *set) {
    if (!atomic_load(&given_known))
        return sched_getaffinity(getpid(), sizeof *set, set) == 0; /* the main thread's */
    *set = given;
    return true;
}

/* The calling thread runs the asyncio loop for this client, and for no other: a miss wakes it, so it belongs where the
 * faulting thread is. */
void us_place_loop(struct us_client *client) {
    if (sched_getaffinity(0, sizeof given, &given))
        return;
    atomic_store(&given_known, true);
    client->loop_tid = (int)syscall(SYS_gettid);
}

/* A thread that was started by the loop has its place too; this takes it off again. */
void us_place_freely(void) {
    if (atomic_load(&given_known))
        sched_setaffinity(0, sizeof given, &given);
}

static void pin(int tid, const cpu_set_t *set) {
    if (tid && CPU_COUNT(set))
        sched_setaffinity(tid, sizeof *set, set);
}

/* Drops are done from the worker's CPU while the program keeps to one; where its threads use several, every CPU pays for a
 * shoot-down and the worker's has the least to spare. */
static void place_drops(struct us_client *client, bool elsewhere) {
    if (elsewhere)
        client->spread_looks = LOOKS_SPREAD;
    else if (client->spread_looks)
        client->spread_looks--;
    atomic_store(&client->channel->drop_cpu, client->spread_looks ? client->server_cpu : client->apart_cpu);
}

void us_place(struct us_client *client, uint32_t thread_id, uint64_t now) {
    if (client->placement == US_PLACE_NONE || !(client->server_runs || client->loop_tid) || now - client->placed_ns < LOOK_EVERY_NS)
        return;
    client->placed_ns = now;
    int cpu = cpu_of_thread(client->pid, thread_id);
    bool elsewhere = cpu >= 0 && cpu != client->server_cpu;
    client->looks_elsewhere = elsewhere ? client->looks_elsewhere + 1 : 0;
    place_drops(client, elsewhere && client->server_cpu >= 0);
    if (!elsewhere || (client->server_cpu >= 0 && client->looks_elsewhere < LOOKS_TO_MOVE))
        return;
    client->looks_elsewhere = 0;
    client->server_cpu = cpu;
    cpu_set_t allowed, near, apart;
    if (!get_given(&allowed))
        return;
    CPU_ZERO(&near);
    CPU_SET((unsigned)cpu, &near);
    apart = allowed;
    CPU_CLR((unsigned)cpu, &apart);
    client->worker_apart = CPU_COUNT(&apart) > 0;
    bool same = client->placement == US_PLACE_SAME && CPU_ISSET((unsigned)cpu, &allowed);
    pin(client->server_tid, same ? &near : &apart);
    pin(client->loop_tid, same ? &near : &allowed);
    pin(client->worker_tid, client->worker_apart ? &apart : &allowed);
    pin(client->helper_tid, same ? &near : &allowed);
    client->apart_cpu = cpu;
    for (int i = 0; i < CPU_SETSIZE && client->worker_apart; i++)
        if (CPU_ISSET((unsigned)i, &apart)) {
            client->apart_cpu = i;
            break;
        }
    atomic_store(&client->channel->move_cpu, cpu);
    atomic_store(&client->channel->drop_cpu, client->apart_cpu);
}
