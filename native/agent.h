/* The agent: one thread in the client that moves and drops the client's pages on the pager's order.
 *
 * Only the client's own memory map can be changed this way (cross-process UFFDIO_MOVE and MADV_DONTNEED are refused by the
 * kernel).  The thread is pure C on raw system calls: no malloc, no lock of the client, every signal masked, so that it can
 * neither deadlock with a thread that sleeps in a fault nor run the client's handlers.
 */
#ifndef US_AGENT_H
#define US_AGENT_H
#include "channel.h"
#include <stdbool.h>

struct us_agent;

struct us_agent_options {
    int channel_fd, uffd, staging_uffd;
    int order_fd;    /* eventfd: orders are there */
    int done_fd;     /* eventfd: the pager waits for results */
    int pager_pidfd; /* readable when the pager is dead; -1: unknown */
    int pager_pid;
    int abort_on_death;
};

/* Open a client's two descriptors: `uffd` for regions, `staging_uffd` (SIGBUS in place of faults) for staging. */
int us_agent_open(bool user_mode_only, int *uffd, int *staging_uffd, uint64_t *features);
int us_agent_start(struct us_agent **out, const struct us_agent_options *options);
uint64_t us_agent_staging(const struct us_agent *agent);
int us_agent_tid(const struct us_agent *agent);
/* Ends the thread; the staging area is unmapped.  Only once the pager has no order open. */
void us_agent_stop(struct us_agent *agent);
/* Register a region: NOHUGEPAGE, DONTFORK, then MISSING | WP. */
int us_agent_register(int uffd, uint64_t start, uint64_t bytes);
/* In a forked child: put an inaccessible mapping where the parent has a region, so that a touch is SIGSEGV and nothing else
 * can be mapped there. */
int us_agent_bar(uint64_t start, uint64_t bytes);
/* Let a process read this one's memory (staging), where Yama would forbid it. */
int us_agent_allow(int pid);
#endif
