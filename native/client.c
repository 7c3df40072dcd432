/* A client as the pager sees it: its descriptors, table, channel and threads. */
#define _GNU_SOURCE
#include "pager.h"
#include "protect.h"
#include "uffd.h"
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

uint64_t us_now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000ull + (uint64_t)time.tv_nsec;
}

static void signal_fd(int fd) {
    uint64_t one = 1;
    ssize_t ignored = write(fd, &one, sizeof one);
    (void)ignored;
}

void us_kick_worker(struct us_client *client) {
    if (atomic_load(&client->worker_asleep) && atomic_exchange(&client->worker_asleep, 0))
        signal_fd(client->kick_fd);
}

void us_kick_helper(struct us_client *client) {
    if (atomic_load(&client->helper_asleep) && atomic_exchange(&client->helper_asleep, 0))
        signal_fd(client->helper_fd);
}

void us_tell_loop(struct us_client *client) {
    if (!atomic_exchange(&client->loop_told, 1))
        signal_fd(client->loop_fd);
}

/* What the agent should tell the user about; `waiting` makes it say so now. */
void us_client_say(struct us_client *client, const char *text, int waiting) {
    struct us_channel *channel = client->channel;
    size_t length = strlen(text);
    if (length >= US_TEXT)
        length = US_TEXT - 1;
    memcpy(channel->text, text, length);
    channel->text[length] = 0;
    if (waiting)
        atomic_fetch_add(&channel->text_version, 1);
}

int us_put_miss(struct us_client *client, const struct us_miss *miss) {
    pthread_mutex_lock(&client->miss_lock);
    bool room = client->miss_head - client->miss_tail < US_MISSES;
    if (room)
        client->miss[client->miss_head++ % US_MISSES] = *miss;
    bool taken = client->loop_serves;
    pthread_mutex_unlock(&client->miss_lock);
    if (!taken)
        us_tell_loop(client);
    return room ? 0 : -ENOSPC;
}

static int take_misses(struct us_client *client, struct us_miss *out, int most) {
    int n = 0;
    pthread_mutex_lock(&client->miss_lock);
    client->loop_serves = false;
    while (n < most && client->miss_tail != client->miss_head)
        out[n++] = client->miss[client->miss_tail++ % US_MISSES];
    pthread_mutex_unlock(&client->miss_lock);
    return n;
}

/* The asyncio loop takes what the fault server could not answer. */
int us_take_misses(struct us_client *client, struct us_miss *out, int most) {
    atomic_store(&client->loop_told, 0);
    return take_misses(client, out, most);
}

/* The loop is the fault server: it takes at once what it could not answer, so that it need not be told of a miss. */
int us_serve_misses(struct us_client *client, int rounds, struct us_miss *out, int most) {
    pthread_mutex_lock(&client->miss_lock);
    client->loop_serves = true;
    pthread_mutex_unlock(&client->miss_lock);
    int rc = us_serve(client, rounds), n = take_misses(client, out, most);
    return n || rc >= 0 ? n : rc;
}

static int make_memfd(const char *name, uint64_t bytes, void **mapped) {
    int fd = memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0)
        return -errno;
    int rc = ftruncate(fd, (off_t)bytes) ? -errno : 0;
    if (rc == 0 && fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL))
        rc = -errno;
    void *at = rc ? MAP_FAILED : mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
    if (at == MAP_FAILED) {
        rc = rc ? rc : -errno;
        close(fd);
        return rc;
    }
    *mapped = at;
    return fd;
}

int us_client_create(struct us_client **out, int uffd, int pid, uint64_t features, int copy_out, uint32_t canary) {
    struct us_client *client = calloc(1, sizeof *client);
    if (!client)
        return -ENOMEM;
    client->uffd = uffd;
    client->pid = pid;
    client->features = features;
    client->copy_out = copy_out != 0;
    client->canary = canary;
    client->server_cpu = client->apart_cpu = -1;
    client->status_fd = client->merging_fd = -1;
    void *channel = NULL;
    int rc = us_table_open(&client->table);
    client->channel_fd = make_memfd("userswap-channel", US_CHANNEL_TOTAL, &channel);
    client->order_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    client->done_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    client->agent_order = client->order_fd;
    client->agent_done = client->kick_fd = client->done_fd;
    client->loop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    client->helper_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    client->miss = calloc(US_MISSES, sizeof *client->miss);
    client->channel = channel;
    pthread_rwlockattr_t attributes;
    pthread_rwlockattr_init(&attributes);
    pthread_rwlockattr_setkind_np(&attributes, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
    pthread_rwlock_init(&client->map_lock, &attributes);
    pthread_rwlockattr_destroy(&attributes);
    pthread_mutex_init(&client->batch_lock, NULL);
    pthread_mutex_init(&client->miss_lock, NULL);
    if (rc || client->channel_fd < 0 || client->order_fd < 0 || client->done_fd < 0 || client->loop_fd < 0 ||
        client->helper_fd < 0 || !client->miss) {
        rc = rc ? rc : client->channel_fd < 0 ? client->channel_fd : -EMFILE;
        us_client_destroy(client);
        return rc;
    }
    client->channel->magic = US_CHANNEL_MAGIC;
    atomic_store(&client->channel->move_cpu, -1);
    atomic_store(&client->channel->drop_cpu, -1);
    for (uint32_t i = 0; i < US_BATCHES; i++)
        client->batch[i].buffer = (uint8_t *)channel + US_CHANNEL_BYTES + (uint64_t)i * US_BATCH_PAGES * US_PAGE;
    *out = client;
    return 0;
}

int us_client_descriptors(const struct us_client *client, int which) {
    const int descriptor[] = {client->table.fd, client->channel_fd, client->agent_order, client->agent_done, client->loop_fd};
    return which >= 0 && which < 5 ? descriptor[which] : -EINVAL;
}

uint64_t us_client_table_bytes(const struct us_client *client) { return us_table_bytes(&client->table); }

/* Before the agent is set. */
void us_client_set_mover(struct us_client *client, int mover) { client->mover = mover; }

void us_client_set_agent(struct us_client *client, uint64_t staging, int tid) {
    client->staging = staging;
    client->agent_tid = tid;
    if (client->mover == US_MOVER_PROTECT)
        us_protect_watch(client, tid);
}

static int start_thread(pthread_t *thread, void *(*body)(void *), struct us_client *client) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are for the main thread's loop */
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, 512 * 1024);
    int rc = -pthread_create(thread, &attributes, body, client);
    pthread_attr_destroy(&attributes);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return rc;
}

/* The server's buffer is its thread's own: made before the first fault, and given back by nobody else. */
static void *serve_to_the_end(void *client) {
    uint8_t *buffer = us_run_buffer();
    us_server_main(client);
    munmap(buffer, US_RUN_MAX * US_PAGE);
    return NULL;
}

int us_client_start(struct us_client *client, int placement) {
    client->placement = placement;
    int rc = start_thread(&client->worker, us_worker_main, client);
    if (rc)
        return rc;
    client->worker_runs = true;
    rc = start_thread(&client->helper, us_helper_main, client);
    if (rc)
        return rc;
    client->helper_runs = true;
    return 0;
}

/* From here on nobody else may call us_serve. */
int us_client_serve(struct us_client *client) {
    client->server_cpu = -1; /* the new thread has not been placed */
    client->server_runs = true;
    int rc = start_thread(&client->server, serve_to_the_end, client);
    if (rc)
        client->server_runs = false;
    return rc;
}

/* Ends the threads.  Regions stay as they are: nobody answers their faults any more. */
void us_client_stop(struct us_client *client) {
    atomic_store(&client->stop, true);
    signal_fd(client->kick_fd);
    signal_fd(client->helper_fd);
    /* these first: a read of the client's memory may need the server to end */
    if (client->worker_runs)
        pthread_join(client->worker, NULL);
    if (client->helper_runs)
        pthread_join(client->helper, NULL);
    atomic_store(&client->server_stop, true);
    /* a signal that comes just before the read is lost: send until the thread has ended */
    while (client->server_runs && !atomic_load(&client->server_ended)) {
        pthread_kill(client->server, US_SERVER_SIGNAL);
        usleep(1000);
    }
    if (client->server_runs)
        pthread_join(client->server, NULL);
    client->server_runs = client->worker_runs = client->helper_runs = false;
}

/* After us_client_stop, once the loop has nothing under way and the pools have ended.  Regions that were not closed go too, with what
 * the agent or the store had of them. */
void us_client_destroy(struct us_client *client) {
    for (uint32_t i = 0; i < US_BATCHES; i++)
        if (atomic_load(&client->batch[i].state) != US_BATCH_FREE)
            us_batch_free(&client->batch[i]);
    while (client->regions) {
        struct us_region *region = client->region[--client->regions];
        region->pool = NULL;
        us_region_free(region);
    }
    us_trust_free(client);
    us_table_close(&client->table);
    if (client->channel)
        munmap(client->channel, US_CHANNEL_TOTAL);
    const int descriptor[] = {client->channel_fd, client->order_fd,  client->done_fd,   client->loop_fd,
                              client->helper_fd,  client->status_fd, client->merging_fd};
    for (unsigned i = 0; i < sizeof descriptor / sizeof *descriptor; i++)
        if (descriptor[i] >= 0)
            close(descriptor[i]);
    free(client->miss);
    free(client->region);
    pthread_rwlock_destroy(&client->map_lock);
    pthread_mutex_destroy(&client->batch_lock);
    pthread_mutex_destroy(&client->miss_lock);
    free(client);
}

/* The client is about to end: no eviction any more, so that no order is carried out on memory that is being torn down.  Returns
 * how many orders are still open: ask again until none is. */
int us_client_quiet(struct us_client *client) {
    atomic_store(&client->quiet, true);
    pthread_mutex_lock(&client->batch_lock);
    int open = (int)(client->order_posted - client->order_reaped);
    for (uint32_t i = 0; i < US_BATCHES; i++)
        open += atomic_load(&client->batch[i].state) == US_BATCH_BUILDING;
    pthread_mutex_unlock(&client->batch_lock);
    pthread_rwlock_rdlock(&client->map_lock);
    for (uint32_t i = 0; i < client->regions; i++)
        us_release(client->region[i], 0); /* who was parked goes on over the budget */
    pthread_rwlock_unlock(&client->map_lock);
    us_kick_worker(client);
    return open;
}

/* Whether the memory that the client shared is no more.  After exec with a forked child alive nothing else tells: the pidfd is
 * that of the new program, and the child holds the socket.  Staging belongs to the other userfaultfd, so nothing is changed. */
int us_client_gone(struct us_client *client) {
    return atomic_load(&client->gone) || us_uffd_unprotect(client->uffd, client->staging, US_PAGE) == -ESRCH;
}

/* A pool moves an object by swapping the one reference to it: the page's word, while that is neither being read nor written. */
static int relocate(void *owner, uint64_t slot, uint64_t from, uint64_t to) {
    struct us_client *client = owner;
    if (slot >= US_TABLE_SLOTS)
        return 0;
    us_word *word = us_table_peek(&client->table, slot);
    if (!word)
        return 0;
    uint64_t seen = atomic_load(word);
    while ((us_state_of(seen) == US_STORED || us_state_of(seen) == US_CLEAN) && us_handle_of(seen) == from)
        if (us_word_swap(word, &seen, us_with_handle(seen, to)))
            return 1;
    return 0;
}

void us_client_own_pool(struct us_client *client, struct us_pool *pool) { us_pool_set_owner(pool, relocate, client); }
