#define _GNU_SOURCE
#include "touch.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>

#define PAGE 4096u
#define RECORD 16u
#define RECORDS (PAGE / RECORD)
#define MARK 0x70617573u /* never zero: a page that was lost reads as zeros and must not pass as page 0 */

struct stamp {
    uint32_t version;
    uint32_t mark;
    uint64_t page;
};
_Static_assert(sizeof(struct stamp) == RECORD, "a stamp is one record");

/* Holds the workers until all of them exist, so that no thread runs alone for a while. */
struct gate {
    pthread_mutex_t lock;
    pthread_cond_t opened;
    enum { GATE_SHUT, GATE_RUN, GATE_LEAVE } state;
};

struct worker {
    const struct us_touch_plan *plan;
    struct gate *gate;
    pthread_t thread;
    const uint32_t *order;
    uint64_t count;
    int32_t cpu;
    int error;
    uint64_t begin_ns;
    uint64_t end_ns;
    struct us_touch_result result;
};

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static uint64_t mix(uint64_t value)
{
    value *= UINT64_C(0x9E3779B97F4A7C15);
    value ^= value >> 32;
    return value * UINT64_C(0xD6E8FEB86659FD93) >> 32;
}

static const uint8_t *sample_of(const uint8_t *sample, uint64_t sample_pages, uint64_t page)
{
    return sample + (mix(page) % sample_pages) * PAGE;
}

static void stamp_write(uint8_t *at, uint64_t page, uint32_t version)
{
    const struct stamp stamp = {.version = version, .mark = MARK, .page = page};
    memcpy(at, &stamp, sizeof stamp);
}

static int stamp_good(const uint8_t *at, uint64_t page, uint32_t version)
{
    struct stamp stamp;
    memcpy(&stamp, at, sizeof stamp);
    return stamp.version == version && stamp.mark == MARK && stamp.page == page;
}

void us_touch_page(const uint8_t *sample, uint64_t sample_pages, uint64_t page, uint32_t version, uint8_t *out)
{
    memcpy(out, sample_of(sample, sample_pages, page), PAGE);
    stamp_write(out, page, version);
    stamp_write(out + PAGE - RECORD, page, version);
}

/* Offset of a record between the stamps, another one at each version. */
static uint32_t middle_of(uint64_t page, uint32_t version)
{
    return RECORD * (1u + (uint32_t)(mix(page ^ (uint64_t)version << 40) % (RECORDS - 2)));
}

static int middle_good(const uint8_t *memory, const uint8_t *expected, uint64_t page, uint32_t version)
{
    const uint32_t offset = middle_of(page, version);
    return memcmp(memory + offset, expected + offset, RECORD) == 0;
}

static int page_good(const uint8_t *memory, const uint8_t *expected, uint64_t page, uint32_t version)
{
    return stamp_good(memory, page, version) && stamp_good(memory + PAGE - RECORD, page, version) &&
           middle_good(memory, expected, page, version);
}

static int page_zero(const uint8_t *memory, uint64_t page)
{
    static const uint8_t zeros[RECORD];
    return memcmp(memory, zeros, RECORD) == 0 && memcmp(memory + PAGE - RECORD, zeros, RECORD) == 0 &&
           memcmp(memory + middle_of(page, 0), zeros, RECORD) == 0;
}

static int update(const struct us_touch_plan *plan, uint8_t *memory, const uint8_t *expected, uint64_t page)
{
    const uint32_t version = plan->versions[page]++;
    const int good = page_good(memory, expected, page, version);
    stamp_write(memory, page, version + 1);
    stamp_write(memory + PAGE - RECORD, page, version + 1);
    return good;
}

static int write_first(const struct us_touch_plan *plan, uint8_t *memory, const uint8_t *expected, uint64_t page)
{
    const uint32_t version = plan->versions[page]++;
    stamp_write(memory, page, version + 1);
    __asm__ volatile("" ::: "memory"); /* the store comes before the loads below, as the operation promises */
    const int good = stamp_good(memory + PAGE - RECORD, page, version) && middle_good(memory, expected, page, version);
    stamp_write(memory + PAGE - RECORD, page, version + 1);
    return good;
}

static int check(uint8_t *memory, const uint8_t *expected, uint64_t page, uint32_t version)
{
    return page_good(memory, expected, page, version) &&
           memcmp(memory + RECORD, expected + RECORD, PAGE - 2 * RECORD) == 0;
}

static int touch(const struct us_touch_plan *plan, uint64_t page)
{
    uint8_t *memory = plan->memory + page * PAGE;
    const uint8_t *expected = sample_of(plan->sample, plan->sample_pages, page);
    const uint32_t version = plan->versions ? plan->versions[page] : 0;

    switch (plan->operation) {
    case US_TOUCH_FILL:
        us_touch_page(plan->sample, plan->sample_pages, page, 0, memory);
        return 1;
    case US_TOUCH_READ:
        return page_good(memory, expected, page, version);
    case US_TOUCH_UPDATE:
        return update(plan, memory, expected, page);
    case US_TOUCH_WRITE:
        return write_first(plan, memory, expected, page);
    case US_TOUCH_ZERO:
        return page_zero(memory, page);
    default:
        return check(memory, expected, page, version);
    }
}

static uint32_t bucket_of(uint64_t ns)
{
    if (ns < (1u << US_TOUCH_SUB_BITS))
        return (uint32_t)ns;
    const uint32_t exponent = 63u - (uint32_t)__builtin_clzll(ns);
    const uint32_t octave = exponent - US_TOUCH_SUB_BITS;
    const uint64_t bucket = ((uint64_t)octave << US_TOUCH_SUB_BITS) + (ns >> octave);
    return bucket < US_TOUCH_BUCKETS ? (uint32_t)bucket : US_TOUCH_BUCKETS - 1;
}

uint64_t us_touch_bucket_floor(uint32_t bucket)
{
    const uint32_t half = 1u << US_TOUCH_SUB_BITS;
    if (bucket < 2 * half)
        return bucket;
    const uint32_t octave = bucket / half - 1;
    return (uint64_t)(bucket - octave * half) << octave;
}

static void run_accesses(struct worker *worker)
{
    const struct us_touch_plan *plan = worker->plan;
    struct us_touch_result *result = &worker->result;
    uint64_t before = now_ns();

    worker->begin_ns = before;
    for (uint64_t i = 0; i < worker->count; i++) {
        const uint64_t page = worker->order[i];
        if (!touch(plan, page) && result->bad++ == 0)
            result->first_bad_page = page;
        const uint64_t after = now_ns();
        const uint64_t latency = after - before;
        result->histogram[bucket_of(latency)]++;
        if (latency > result->latency_max_ns)
            result->latency_max_ns = latency;
        before = after;
    }
    worker->end_ns = before;
    result->accesses = worker->count;
}

static int gate_pass(struct gate *gate)
{
    pthread_mutex_lock(&gate->lock);
    while (gate->state == GATE_SHUT)
        pthread_cond_wait(&gate->opened, &gate->lock);
    const int state = gate->state;
    pthread_mutex_unlock(&gate->lock);
    return state;
}

static void gate_open(struct gate *gate, int state)
{
    pthread_mutex_lock(&gate->lock);
    gate->state = state;
    pthread_cond_broadcast(&gate->opened);
    pthread_mutex_unlock(&gate->lock);
}

static void *worker_main(void *argument)
{
    struct worker *worker = argument;

    if (worker->cpu >= 0) {
        cpu_set_t set;
        CPU_ZERO(&set);
        CPU_SET((size_t)worker->cpu, &set);
        worker->error = pthread_setaffinity_np(pthread_self(), sizeof set, &set);
    }
    if (gate_pass(worker->gate) == GATE_RUN && !worker->error)
        run_accesses(worker);
    return NULL;
}

static void merge(struct us_touch_result *total, const struct us_touch_result *part)
{
    if (part->bad && !total->bad)
        total->first_bad_page = part->first_bad_page;
    total->bad += part->bad;
    total->accesses += part->accesses;
    if (part->latency_max_ns > total->latency_max_ns)
        total->latency_max_ns = part->latency_max_ns;
    for (uint32_t i = 0; i < US_TOUCH_BUCKETS; i++)
        total->histogram[i] += part->histogram[i];
}

static uint64_t timeval_ns(struct timeval t)
{
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_usec * 1000u;
}

static void add_usage(struct us_touch_result *result, const struct rusage *before, const struct rusage *after)
{
    result->user_ns = timeval_ns(after->ru_utime) - timeval_ns(before->ru_utime);
    result->system_ns = timeval_ns(after->ru_stime) - timeval_ns(before->ru_stime);
    result->major_faults = (uint64_t)(after->ru_majflt - before->ru_majflt);
    result->minor_faults = (uint64_t)(after->ru_minflt - before->ru_minflt);
}

/* With a thread less than asked for it would be another measurement: then those that exist leave without touching. */
static int run_workers(struct worker *workers, uint32_t threads, struct gate *gate)
{
    uint32_t made = 0;
    int error = 0;

    while (made < threads && !error) {
        error = pthread_create(&workers[made].thread, NULL, worker_main, &workers[made]);
        made += !error;
    }
    gate_open(gate, error ? GATE_LEAVE : GATE_RUN);
    for (uint32_t t = 0; t < made; t++) {
        pthread_join(workers[t].thread, NULL);
        if (!error)
            error = workers[t].error;
    }
    return -error;
}

static void collect(const struct worker *workers, uint32_t threads, struct us_touch_result *result)
{
    uint64_t begin = UINT64_MAX;
    uint64_t end = 0;

    for (uint32_t t = 0; t < threads; t++) {
        merge(result, &workers[t].result);
        begin = workers[t].begin_ns < begin ? workers[t].begin_ns : begin;
        end = workers[t].end_ns > end ? workers[t].end_ns : end;
    }
    result->elapsed_ns = end - begin;
}

static int plan_good(const struct us_touch_plan *plan)
{
    const int writes = plan->operation == US_TOUCH_UPDATE || plan->operation == US_TOUCH_WRITE;
    return plan->memory && plan->sample && plan->order && plan->sample_pages && plan->threads &&
           plan->threads <= US_TOUCH_MAX_THREADS && plan->operation <= US_TOUCH_CHECK && (!writes || plan->versions);
}

int us_touch_run(const struct us_touch_plan *plan, struct us_touch_result *result)
{
    struct gate gate = {.lock = PTHREAD_MUTEX_INITIALIZER, .opened = PTHREAD_COND_INITIALIZER, .state = GATE_SHUT};
    struct rusage before, after;

    memset(result, 0, sizeof *result);
    if (!plan_good(plan))
        return -EINVAL;
    struct worker *workers = calloc(plan->threads, sizeof *workers);
    if (!workers)
        return -ENOMEM;
    for (uint32_t t = 0; t < plan->threads; t++) {
        const uint64_t first = plan->count * t / plan->threads;
        workers[t].plan = plan;
        workers[t].gate = &gate;
        workers[t].order = plan->order + first;
        workers[t].count = plan->count * (t + 1) / plan->threads - first;
        workers[t].cpu = plan->cpus[t];
    }
    getrusage(RUSAGE_SELF, &before);
    const int rc = run_workers(workers, plan->threads, &gate);
    getrusage(RUSAGE_SELF, &after);
    if (rc == 0) {
        collect(workers, plan->threads, result);
        add_usage(result, &before, &after);
    }
    free(workers);
    return rc;
}

uint64_t us_touch_clock_cost(void)
{
    enum { READINGS = 100000 };
    const uint64_t before = now_ns();
    for (uint32_t i = 0; i < READINGS; i++) {
        struct timespec t;
        clock_gettime(CLOCK_MONOTONIC, &t);
    }
    return (now_ns() - before) * 1000u / READINGS;
}
