#define _GNU_SOURCE
#include "agent.h"
#include "uffd.h"
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434
#endif
#ifndef SYS_process_madvise
#define SYS_process_madvise 440
#endif

#ifndef MADV_DONTNEED_LOCKED
#define MADV_DONTNEED_LOCKED 24 /* Linux 5.18: drops mlocked pages too */
#endif

#define WATCH_MS 1000       /* how often waiting faults are looked at */
#define WAIT_LIMIT_TICKS 7u /* a fault that waits this many looks is spoken of; the pager, which knows more, does so after 5 s */

struct us_agent {
    struct us_agent_options options;
    struct us_channel *channel;
    uint8_t *buffers; /* the pager's buffers, see copy_out */
    uint8_t *staging;
    pthread_t thread;
    _Atomic int tid;
    int self_pidfd;
    int wake_fd; /* ends the thread's sleep: what it is given may be readable alone */
    int fdinfo;
    int cpu;
    uint32_t next; /* the next order of the ring */
    uint32_t stuck_ticks;
    uint32_t text_said;
    uint64_t progress_seen, watched_ms;
    bool stuck_said;
};

int us_agent_open(bool user_mode_only, int *uffd, int *staging_uffd, uint64_t *features) {
    uint64_t wanted = US_FEATURE_PAGEFAULT_WP | US_FEATURE_THREAD_ID | US_FEATURE_POISON | US_FEATURE_MOVE;
    int fd = us_uffd_open(user_mode_only, wanted, features);
    if (fd < 0)
        return fd;
    uint64_t granted;
    /* SIGBUS: a hole in staging ends the pager's process_vm_readv short in place of hanging it for ever */
    int second = us_uffd_open(user_mode_only, US_FEATURE_SIGBUS | US_FEATURE_MOVE, &granted);
    if (second < 0) {
        close(fd);
        return second;
    }
    *uffd = fd;
    *staging_uffd = second;
    return 0;
}

int us_agent_register(int uffd, uint64_t start, uint64_t bytes) {
    void *memory = (void *)(uintptr_t)start;
    /* EINVAL: a kernel without transparent huge pages */
    if (madvise(memory, bytes, MADV_NOHUGEPAGE) && errno != EINVAL)
        return -errno;
    if (madvise(memory, bytes, MADV_DONTFORK))
        return -errno;
    return us_uffd_register(uffd, start, bytes, US_MODE_MISSING | US_MODE_WP);
}

int us_agent_bar(uint64_t start, uint64_t bytes) {
    void *want = (void *)(uintptr_t)start;
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE;
    void *got = mmap(want, bytes, PROT_NONE, flags, -1, 0);
    return got == MAP_FAILED ? -errno : 0;
}

static void say(const char *text, size_t length) {
    struct pollfd output = {.fd = 2, .events = POLLOUT};
    if (poll(&output, 1, 0) == 1 && (output.revents & POLLOUT)) {
        ssize_t ignored = write(2, text, length);
        (void)ignored;
    }
}

static void say_line(struct us_agent *agent, const char *what) {
    char line[US_TEXT + 256], about[US_TEXT];
    memcpy(about, agent->channel->text, sizeof about);
    about[sizeof about - 1] = 0;
    int length = snprintf(line, sizeof line, "userswap: %s (pager pid %d)%s%s\n", what, agent->options.pager_pid,
                          about[0] ? ": " : "", about);
    say(line, (size_t)length < sizeof line ? (size_t)length : sizeof line - 1);
}

static void move_run(struct us_agent *agent, struct us_order *order, const struct us_run *run, uint32_t first) {
    uint32_t page = 0, again = 0;
    bool singly = false; /* a run over a boundary of mappings is refused whole */
    while (page < run->pages) {
        uint32_t pages = singly ? 1 : run->pages - page;
        uint64_t done, source = run->address + (uint64_t)page * US_PAGE;
        uint8_t *slot = agent->staging + ((uint64_t)run->staging + page) * US_PAGE;
        int rc = us_uffd_move(agent->options.staging_uffd, (uint64_t)(uintptr_t)slot, source,
                              (uint64_t)pages * US_PAGE, &done);
        for (uint64_t i = 0; i < done / US_PAGE; i++)
            order->taken |= 1ull << (first + page + i);
        page += (uint32_t)(done / US_PAGE);
        if (rc == 0)
            continue;
        if (rc == -EINVAL && pages > 1) {
            singly = true;
            continue;
        }
        if (rc == -EAGAIN && (done || again++ < 3))
            continue; /* partial progress: the next call tells the page's own errno */
        unsigned char resident = 1;
        if (rc == -ENOENT && mincore((void *)(uintptr_t)(run->address + (uint64_t)page * US_PAGE), US_PAGE, &resident) == 0 &&
            !(resident & 1))
            order->absent |= 1ull << (first + page);
        else
            order->error = rc; /* EBUSY: pinned or shared; EINVAL: mlocked */
        page++;
        again = 0;
    }
}

static void move_out(struct us_agent *agent, struct us_order *order) {
    uint32_t first = 0;
    for (uint32_t i = 0; i < order->runs; i++) {
        move_run(agent, order, &order->run[i], first);
        first += order->run[i].pages;
    }
}

static uint64_t bits(uint32_t first, uint32_t count) {
    return (count >= 64 ? ~0ull : (1ull << count) - 1) << first;
}

/* Where the pager may not read this process: copy the moved pages (which are here, so this faults nothing) to its buffer. */
static void copy_out(struct us_agent *agent, const struct us_order *order) {
    uint64_t base = (uint64_t)order->run[0].staging * US_PAGE;
    for (uint32_t page = 0; page < order->run[0].pages; page++)
        if (order->taken >> page & 1)
            memcpy(agent->buffers + base + (uint64_t)page * US_PAGE, agent->staging + base + (uint64_t)page * US_PAGE, US_PAGE);
}

/* The same where the pages still are in place: protected, and BUSY, so that none of them is dropped meanwhile.  By a system call,
 * which ends at a page that the program itself may not read, where a read of ours would end the program. */
static void read_out(struct us_agent *agent, struct us_order *order) {
    uint64_t to = US_CHANNEL_BYTES + (uint64_t)(order->batch % US_BATCHES) * US_BATCH_PAGES * US_PAGE;
    uint32_t first = 0;
    for (uint32_t i = 0; i < order->runs && first + order->run[i].pages <= US_BATCH_PAGES; first += order->run[i++].pages) {
        const struct us_run *run = &order->run[i];
        for (uint32_t page = 0; page < run->pages; page++) { /* past the page that ended the read: it stays */
            const uint8_t *from = (const uint8_t *)(uintptr_t)run->address + (size_t)page * US_PAGE;
            size_t length = (size_t)(run->pages - page) * US_PAGE;
            ssize_t got = pwrite(agent->options.channel_fd, from, length, (off_t)(to + (uint64_t)(first + page) * US_PAGE));
            uint32_t read = got > 0 ? (uint32_t)((size_t)got / US_PAGE) : 0;
            order->taken |= bits(first + page, read);
            page += read;
        }
    }
}

/* Before 5.18 the kernel does not know how to drop mlocked pages: then those stay. */
static int drop_run(void *start, size_t length, int advice) {
    int rc = madvise(start, length, advice);
    return rc && errno == EINVAL && advice == MADV_DONTNEED_LOCKED ? madvise(start, length, MADV_DONTNEED) : rc;
}

/* Drop pages of the region in place: one vectored call, since each call costs a TLB shoot-down. */
static void drop(struct us_agent *agent, struct us_order *order, int advice) {
    struct iovec vector[US_BATCH_PAGES];
    size_t total = 0;
    for (uint32_t i = 0; i < order->runs; i++) {
        vector[i].iov_base = (void *)(uintptr_t)order->run[i].address;
        vector[i].iov_len = (size_t)order->run[i].pages * US_PAGE;
        total += vector[i].iov_len;
    }
    long advised = syscall(SYS_process_madvise, agent->self_pidfd, vector, order->runs, advice, 0);
    if (advised == (long)total) {
        order->taken = bits(0, (uint32_t)(total / US_PAGE));
        return;
    }
    /* before 6.13 the call refuses DONTNEED: run by run then; mlocked pages refuse it always, and take no neighbour along */
    uint32_t bit = 0;
    for (uint32_t i = 0; i < order->runs; bit += order->run[i++].pages) {
        if (drop_run(vector[i].iov_base, vector[i].iov_len, advice) == 0) {
            order->taken |= bits(bit, order->run[i].pages);
            continue;
        }
        for (uint32_t page = 0; page < order->run[i].pages; page++)
            if (drop_run((uint8_t *)vector[i].iov_base + (size_t)page * US_PAGE, US_PAGE, advice) == 0)
                order->taken |= 1ull << (bit + page);
            else
                order->error = -errno;
    }
}

static void carry_out(struct us_agent *agent, struct us_order *order) {
    if (order->kind == US_ORDER_COPY) {
        copy_out(agent, order);
        return;
    }
    order->taken = order->absent = 0;
    order->error = 0;
    if (order->runs > US_BATCH_PAGES)
        return;
    if (order->kind == US_ORDER_MOVE) {
        move_out(agent, order);
    } else if (order->kind == US_ORDER_DROP) {
        drop(agent, order, MADV_DONTNEED);
    } else if (order->kind == US_ORDER_DISCARD) {
        drop(agent, order, MADV_DONTNEED_LOCKED);
    } else if (order->kind == US_ORDER_READ) {
        read_out(agent, order);
    } else if (order->kind == US_ORDER_RELEASE) {
        const struct us_run *run = &order->run[0];
        if (madvise(agent->staging + (uint64_t)run->staging * US_PAGE, (size_t)run->pages * US_PAGE, MADV_DONTNEED_LOCKED) == 0)
            order->taken = 1;
        else
            order->error = -errno;
    }
}

/* A move flushes the TLB for each run, so it belongs on the CPU that uses the memory; a vectored drop flushes once for all its
 * pages, which may be done from afar, and leaves that CPU to the program. */
static void follow_cpu(struct us_agent *agent, uint32_t kind) {
    if (kind != US_ORDER_MOVE && kind != US_ORDER_DROP)
        return;
    int cpu = atomic_load(kind == US_ORDER_MOVE ? &agent->channel->move_cpu : &agent->channel->drop_cpu);
    if (cpu == agent->cpu || cpu < 0 || cpu >= CPU_SETSIZE)
        return;
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET((unsigned)cpu, &set);
    sched_setaffinity(0, sizeof set, &set);
    agent->cpu = cpu;
}

static bool take_order(struct us_agent *agent) {
    struct us_channel *channel = agent->channel;
    struct us_order *order = &channel->order[agent->next % US_ORDERS];
    uint32_t state = US_ORDER_POSTED;
    bool taken = atomic_compare_exchange_strong(&order->state, &state, US_ORDER_TAKEN);
    if (!taken && state != US_ORDER_REVOKED)
        return false;
    if (taken) {
        follow_cpu(agent, order->kind);
        carry_out(agent, order);
    }
    agent->next++;
    atomic_store(&order->state, US_ORDER_DONE);
    if (atomic_exchange(&channel->pager_waits, 0)) {
        uint64_t one = 1;
        ssize_t ignored = write(agent->options.done_fd, &one, sizeof one);
        (void)ignored;
    }
    return true;
}

/* Threads that wait for a fault of this client, as the kernel counts them. */
static uint64_t waiting_faults(struct us_agent *agent) {
    char text[256];
    ssize_t length = agent->fdinfo < 0 ? -1 : pread(agent->fdinfo, text, sizeof text - 1, 0);
    if (length <= 0)
        return 0;
    text[length] = 0;
    const char *total = strstr(text, "total:");
    return total ? strtoull(total + 6, NULL, 10) : 0;
}

static void watch_waiting(struct us_agent *agent) {
    struct us_channel *channel = agent->channel;
    uint32_t version = atomic_load(&channel->text_version);
    if (version != agent->text_said) { /* the pager itself tells what waits for a store */
        agent->text_said = version;
        say_line(agent, "waited more than 5 s");
    }
    uint64_t progress = atomic_load(&channel->progress);
    if (progress != agent->progress_seen || waiting_faults(agent) == 0) {
        agent->progress_seen = progress;
        agent->stuck_ticks = 0;
        agent->stuck_said = false;
    } else if (++agent->stuck_ticks >= WAIT_LIMIT_TICKS && !agent->stuck_said) {
        agent->stuck_said = true;
        if (!channel->text[0])
            say_line(agent, "a page fault has waited more than 5 s: the pager does not answer; continue it (SIGCONT), or kill it to "
                            "end this process");
    }
}

static bool time_to_watch(struct us_agent *agent) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
    uint64_t milliseconds = (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
    if (milliseconds - agent->watched_ms < WATCH_MS * 9 / 10)
        return false;
    agent->watched_ms = milliseconds;
    return true;
}

static void pager_died(struct us_agent *agent) {
    if (!agent->options.abort_on_death) {
        say_line(agent, "the pager died: memory of this process that was paged out is out of reach; threads that touch it wait "
                        "(on_pager_death=\"block\"), none reads zeros");
        return;
    }
    say_line(agent, "the pager died: memory of this process that was paged out is lost; aborting (on_pager_death=\"abort\")");
    struct sigaction standard = {.sa_handler = SIG_DFL};
    sigaction(SIGABRT, &standard, NULL);
    kill(getpid(), SIGABRT);
}

static void *agent_main(void *argument) {
    struct us_agent *agent = argument;
    struct us_channel *channel = agent->channel;
    atomic_store(&agent->tid, (int)syscall(SYS_gettid));
    struct pollfd wait[3] = {{.fd = agent->options.order_fd, .events = POLLIN},
                             {.fd = agent->options.pager_pidfd, .events = POLLIN},
                             {.fd = agent->wake_fd, .events = POLLIN}};
    while (!atomic_load(&channel->quit)) {
        while (take_order(agent))
            continue;
        atomic_store(&channel->agent_asleep, 1);
        if (take_order(agent))
            continue;
        if (atomic_load(&channel->quit))
            break;
        int ready = poll(wait, 3, WATCH_MS);
        atomic_store(&channel->agent_asleep, 0);
        if (time_to_watch(agent))
            watch_waiting(agent);
        if (wait[0].revents & (POLLHUP | POLLERR))
            wait[0].fd = -1; /* a pipe whose writer is gone: the pidfd tells of that */
        if (wait[0].revents & POLLIN) {
            uint64_t count;
            ssize_t ignored = read(agent->options.order_fd, &count, sizeof count);
            (void)ignored;
        }
        if (ready > 0 && wait[1].revents) {
            wait[1].fd = -1;
            if (!atomic_load(&channel->quit))
                pager_died(agent);
        }
    }
    return NULL;
}

static int map_agent(struct us_agent *agent) {
    void *channel = mmap(NULL, US_CHANNEL_TOTAL, PROT_READ | PROT_WRITE, MAP_SHARED, agent->options.channel_fd, 0);
    if (channel == MAP_FAILED)
        return -errno;
    agent->channel = channel;
    agent->buffers = (uint8_t *)channel + US_CHANNEL_BYTES;
    if (agent->channel->magic != US_CHANNEL_MAGIC)
        return -EPROTO;
    size_t bytes = (size_t)US_STAGING_PAGES * US_PAGE;
    void *staging = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (staging == MAP_FAILED)
        return -errno;
    agent->staging = staging;
    if (madvise(channel, US_CHANNEL_TOTAL, MADV_DONTFORK))
        return -errno;
    if (madvise(staging, bytes, MADV_NOHUGEPAGE) && errno != EINVAL)
        return -errno;
    if (madvise(staging, bytes, MADV_DONTFORK))
        return -errno;
    return us_uffd_register(agent->options.staging_uffd, (uint64_t)(uintptr_t)staging, bytes, US_MODE_MISSING);
}

static void free_agent(struct us_agent *agent) {
    if (agent->staging)
        munmap(agent->staging, (size_t)US_STAGING_PAGES * US_PAGE);
    if (agent->channel)
        munmap(agent->channel, US_CHANNEL_TOTAL);
    if (agent->self_pidfd >= 0)
        close(agent->self_pidfd);
    if (agent->fdinfo >= 0)
        close(agent->fdinfo);
    if (agent->wake_fd >= 0)
        close(agent->wake_fd);
    free(agent);
}

int us_agent_start(struct us_agent **out, const struct us_agent_options *options) {
    struct us_agent *agent = calloc(1, sizeof *agent);
    if (!agent)
        return -ENOMEM;
    agent->options = *options;
    agent->cpu = -1;
    agent->self_pidfd = (int)syscall(SYS_pidfd_open, getpid(), 0);
    char path[64];
    snprintf(path, sizeof path, "/proc/self/fdinfo/%d", options->uffd);
    agent->fdinfo = open(path, O_RDONLY | O_CLOEXEC);
    agent->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    int rc = agent->wake_fd < 0 ? -errno : map_agent(agent);
    if (rc == 0) {
        sigset_t all, before;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        pthread_attr_t attributes;
        pthread_attr_init(&attributes);
        pthread_attr_setstacksize(&attributes, 256 * 1024);
        rc = -pthread_create(&agent->thread, &attributes, agent_main, agent);
        pthread_attr_destroy(&attributes);
        pthread_sigmask(SIG_SETMASK, &before, NULL);
    }
    if (rc) {
        free_agent(agent);
        return rc;
    }
    while (!atomic_load(&agent->tid)) /* the pager reads this process by the thread's number */
        sched_yield();
    *out = agent;
    return 0;
}

int us_agent_tid(const struct us_agent *agent) { return agent->tid; }

uint64_t us_agent_staging(const struct us_agent *agent) { return (uint64_t)(uintptr_t)agent->staging; }

void us_agent_stop(struct us_agent *agent) {
    uint64_t one = 1;
    atomic_store(&agent->channel->quit, 1);
    ssize_t ignored = write(agent->wake_fd, &one, sizeof one);
    (void)ignored;
    pthread_join(agent->thread, NULL);
    free_agent(agent);
}

int us_agent_allow(int pid) {
    /* Yama: name the pager as one that may read this process.  EINVAL: a kernel without Yama, where nothing is needed. */
    return prctl(PR_SET_PTRACER, (unsigned long)pid, 0, 0, 0) && errno != EINVAL ? -errno : 0;
}
