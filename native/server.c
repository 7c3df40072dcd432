/* The fault server: reads a client's userfaultfd and answers what is in memory; the rest goes to the asyncio loop.
 *
 * It never waits: not for a lock held across I/O, not for the agent, not for a store.  A message that meets a passing state
 * sets WAITER and is forgotten; whoever ends the state wakes the thread, whose fault then comes again.
 */
#define _GNU_SOURCE
#include "uffd.h"
#include "pager.h"
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define MESSAGES 16
#define EMPTY_MS 10

/* Park a fault for want of room: it sleeps on in the kernel until us_release wakes the region. */
static bool park(struct us_region *region) {
    atomic_store(&region->parked, 1);
    us_count(&region->count.parked, 1);
    us_kick_worker(region->client);
    if (!us_reserve(region, 1, false)) {
        us_kick_helper(region->client);
        return true;
    }
    us_release(region, 0); /* room came between the two looks, and is taken: nobody is parked by this fault */
    return false;
}

static bool forget(struct us_region *region, uint32_t index, uint64_t seen) {
    us_count(&region->count.forgotten, 1);
    return us_word_swap(us_word_at(region, index), &seen, seen | US_WAITER);
}

/* A message for a resident page.  Under UNPROTECTING no evictor can take the page away while the ioctl acts on it. */
static bool resolve_resident(struct us_region *region, uint32_t index, uint64_t seen, bool protect) {
    struct us_client *client = region->client;
    us_word *word = us_word_at(region, index);
    uint64_t address = us_address(region, index), copy = us_handle_of(seen), done;
    bool clean = us_state_of(seen) == US_CLEAN;
    if (clean && protect && us_canary_on(client, US_CANARY_STALE_CLEAN)) {
        us_uffd_unprotect(client->uffd, address, US_PAGE);
        return true;
    }
    if (!us_word_swap(word, &seen, us_with_state(seen, US_UNPROTECTING)))
        return false;
    bool written = protect;
    if (protect) {
        us_count(&region->count.protect, 1);
        us_uffd_unprotect(client->uffd, address, US_PAGE); /* wakes */
        if (clean) {
            uint32_t upgrade = atomic_load_explicit(&region->upgrade, memory_order_relaxed);
            atomic_store_explicit(&region->upgrade, upgrade + (256 - upgrade) / 16, memory_order_relaxed);
        }
    } else {
        /* Missing, yet we think it resident: two threads came for one page, or the program itself dropped the memory, and then
         * what it must see is zeros, never an old copy. */
        us_count(&region->count.spurious, 1);
        if (us_uffd_copy(client->uffd, address, us_zero_page(), US_PAGE, 0, &done) == 0)
            written = true;
        else
            us_uffd_wake(client->uffd, address, US_PAGE);
    }
    bool stays = clean && !written;
    uint64_t old = us_word_leave(word, US_UNPROTECTING, stays ? US_CLEAN : US_DIRTY, stays ? copy : 0, 0, 0);
    us_wake_page(region, index, old);
    if (clean && !stays)
        us_drop_copy(region, copy, true);
    return true;
}

/* Rescue: the page left for staging and its data is in the batch's buffer.  The pin is taken before the word is looked at again:
 * the worker ends a batch only after no word says LEAVING and then no pin is left (settle_rescues). */
static bool rescue(struct us_region *region, uint32_t index, uint64_t seen) {
    struct us_client *client = region->client;
    uint64_t where = us_handle_of(seen) - 1;
    struct us_batch *batch = &client->batch[where / US_BATCH_PAGES % US_BATCHES];
    atomic_fetch_add(&batch->pins, 1);
    bool ours = us_word_swap(us_word_at(region, index), &seen, us_with_handle(us_with_state(seen, US_FILLING), 0));
    if (!ours) {
        us_release(region, US_PAGE);
    } else {
        us_count(&region->count.rescue, 1);
        uint64_t slot = where % US_BATCH_PAGES;
        /* no memory at the moment: the page stays FILLING, and the worker that ends the batch installs it */
        if (us_install_rescued(region, index, batch->buffer + slot * US_PAGE))
            atomic_fetch_or(&batch->stranded, 1ull << slot);
    }
    atomic_fetch_sub(&batch->pins, 1);
    return ours;
}

static bool await_store(struct us_region *region, uint32_t index, uint64_t seen, bool write, uint32_t ahead, uint64_t now) {
    struct us_client *client = region->client;
    uint64_t ticket = us_next_ticket(client);
    uint64_t filling = us_with_handle(us_with_state(seen & ~US_AHEAD, US_FILLING), ticket) | US_BUSY;
    if (!us_word_swap(us_word_at(region, index), &seen, filling)) {
        us_release(region, US_PAGE);
        return false;
    }
    struct us_miss miss = {.region = region, .ticket = ticket, .time_ns = now, .first = index, .count = 1, .write = write};
    us_count(&region->count.awaited, 1);
    if (us_put_miss(client, &miss)) {
        us_discard_end(region, index, us_fill_failed(region, &miss, 0)); /* the queue is full: the fault comes again */
        return true;
    }
    if (ahead)
        us_await_ahead(region, index + 1, ahead, now);
    return true;
}

struct fault {
    struct us_region *region;
    uint64_t flags, now;
    uint32_t index;
    bool parked;
    bool asked; /* the prefetch policy is told once, and not of a fault that is parked: that one comes again */
    struct us_ahead ahead;
};

static uint32_t ask_policy(struct fault *fault) {
    if (!fault->asked)
        fault->ahead = fault->region->prefetch->fault(fault->region->prefetch_state, fault->index);
    fault->asked = true;
    return fault->ahead.stride == 1 ? fault->ahead.count : 0;
}

/* True when the message is done with; false: the word changed under us, look again. */
static bool answer(struct fault *fault) {
    struct us_region *region = fault->region;
    uint32_t index = fault->index, run;
    uint64_t seen = atomic_load(us_word_at(region, index));
    bool write = fault->flags & (US_FAULT_WRITE | US_FAULT_WP);
    enum us_state state = us_state_of(seen);
    switch (state) {
    case US_CLEAN:
    case US_DIRTY:
    case US_PROTECTED:
        return resolve_resident(region, index, seen, fault->flags & US_FAULT_WP);
    case US_ZERO:
    case US_STORED:
    case US_LEAVING:
        if (!us_reserve(region, 1, false) && park(region)) {
            fault->parked = true;
            return true;
        }
        if (state == US_LEAVING)
            return rescue(region, index, seen);
        run = ask_policy(fault);
        if (state == US_STORED && !region->pool)
            return await_store(region, index, seen, write, run, fault->now);
        return us_fill_native(region, index, seen, run, write, fault->ahead.count != 0);
    case US_POISONED:
        us_uffd_poison(region->client->uffd, us_address(region, index), US_PAGE);
        us_uffd_wake(region->client->uffd, us_address(region, index), US_PAGE);
        return true;
    default:
        return forget(region, index, seen);
    }
}

/* False: the fault was parked, and will come again. */
static bool serve_message(struct us_client *client, const struct us_uffd_message *message, uint64_t now) {
    if (message->event != US_EVENT_PAGEFAULT)
        return true;
    uint64_t address = message->address & ~(uint64_t)(US_PAGE - 1);
    struct us_region *region = us_region_find(client, address);
    if (!region) { /* it was closed meanwhile */
        us_uffd_wake(client->uffd, address, US_PAGE);
        return true;
    }
    struct fault fault = {.region = region, .flags = message->flags, .now = now};
    fault.index = (uint32_t)((address - region->start) >> US_PAGE_SHIFT);
    while (!answer(&fault))
        continue;
    if (fault.ahead.stride != 0 && fault.ahead.stride != 1)
        us_read_strided(region, fault.index, fault.ahead, message->flags & US_FAULT_WRITE, now);
    if (fault.ahead.runs)
        us_read_runs(region, region->prefetch->runs(region->prefetch_state), fault.ahead.runs,
                     message->flags & US_FAULT_WRITE, now);
    if (!fault.parked)
        us_histogram_add(&region->native, us_now() - now);
    return !fault.parked;
}

/* Read and answer what is there, at most `rounds` reads.  Returns the number of messages, or -errno. */
int us_serve(struct us_client *client, int rounds) {
    struct us_uffd_message message[MESSAGES];
    int served = 0;
    while (rounds-- > 0) {
        /* not read(): as a cancellation point that pays two atomic operations a call in a process of several threads */
        ssize_t length = syscall(SYS_read, client->uffd, message, sizeof message);
        if (length < 0)
            return errno == EAGAIN || errno == EINTR ? served : -errno;
        uint64_t now = us_now();
        int n = (int)((size_t)length / sizeof *message);
        pthread_rwlock_rdlock(&client->map_lock);
        uint64_t answered = 0;
        for (int i = 0; i < n; i++)
            answered += serve_message(client, &message[i], now);
        pthread_rwlock_unlock(&client->map_lock);
        atomic_fetch_add_explicit(&client->channel->progress, answered, memory_order_relaxed);
        us_place(client, message[n - 1].thread_id, now);
        served += n;
        if (n < MESSAGES)
            break;
    }
    return served;
}

static void interrupted(int number) { (void)number; }

/* The server sleeps in read(), which costs one system call a fault where poll() and read() cost two; a signal of its own
 * ends it. */
static int prepare_sleep(struct us_client *client) {
    struct sigaction action = {.sa_handler = interrupted}; /* no SA_RESTART: the read ends with EINTR */
    sigset_t mine;
    sigemptyset(&mine);
    sigaddset(&mine, US_SERVER_SIGNAL);
    int flags = fcntl(client->uffd, F_GETFL);
    if (sigaction(US_SERVER_SIGNAL, &action, NULL) || flags < 0 || fcntl(client->uffd, F_SETFL, flags & ~O_NONBLOCK))
        return -errno;
    return -pthread_sigmask(SIG_UNBLOCK, &mine, NULL);
}

/* A read that came back empty: the client, which has the descriptor too, has made it non-blocking. */
static void rest(struct us_client *client) {
    struct pollfd wait = {.fd = client->uffd, .events = POLLIN};
    if (poll(&wait, 1, EMPTY_MS) > 0 && (wait.revents & ~POLLIN))
        usleep(EMPTY_MS * 1000);
}

void *us_server_main(void *argument) {
    struct us_client *client = argument;
    client->server_tid = (int)syscall(SYS_gettid);
    int rc = prepare_sleep(client);
    while (rc >= 0 && !atomic_load(&client->server_stop)) {
        rc = us_serve(client, 1);
        if (rc == 0)
            rest(client);
    }
    atomic_store(&client->server_ended, true);
    return NULL;
}
