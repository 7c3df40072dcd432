/* The hot loop of the host's end of an NVMe/TCP queue: commands into capsules, received bytes into buffers, completions.
 *
 * The rules are those of backends/nvme_tcp/qpair.py, of which this is the RUNNING state without its errors: what is in order is
 * done here; at the first PDU that is not, everything stops before it (US_NVME_LOOK), so that Python's machine can take over the
 * state (us_nvme_command, us_nvme_form, us_nvme_piece) and say what is wrong in its own words.
 *
 * Memory: bytes go only into the buffer of the outstanding command that they name, at the place that comes next, never beyond
 * its length.  The caller keeps a buffer in place from submission until its command completed or was abandoned; not longer, what
 * is still unsent then goes from copies.  The scratch buffer, too, is the caller's.  A queue takes 128 KiB for CIDs, of which
 * the pages of those in use are touched, and a little for each command.
 *
 * One thread alone calls all of this for one queue.  The socket is the caller's, and does not block.
 */
#ifndef US_NVME_QUEUE_H
#define US_NVME_QUEUE_H
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Of what the receiving functions return, beside the number of completions: */
#define US_NVME_COUNT 0xffff
#define US_NVME_LOOK 0x10000 /* what comes next is not for this code */
#define US_NVME_EOF 0x20000  /* the peer sends nothing more */
#define US_NVME_OUT 0x40000  /* there is something to send */
#define US_NVME_LATE 0x80000 /* waiting took all its time, or more */

struct us_nvme_queue;

struct us_nvme_form {
    uint32_t capacity;   /* commands outstanding, below 65536 */
    uint32_t entries;    /* of the submission queue, that heads are held against; 0 without flow control */
    uint32_t in_capsule; /* bytes of data that go along with a command */
    uint32_t maxh2cdata;
    uint32_t r2ts;      /* open for one command */
    uint32_t alignment; /* of the data of PDUs that are sent */
    uint32_t next_cid;
    uint32_t largest; /* transfer so far, in bytes */
    bool header_digest, data_digest;
    uint8_t *scratch; /* takes what is not received into its place */
    uint32_t scratch_size, start, end; /* of what lies in scratch already */
};

struct us_nvme_room {
    int32_t cid; /* of the command whose buffer it is; -1: the scratch buffer's */
    uint32_t at;
    uint32_t length;
};

struct us_nvme_command {
    uint8_t *into;       /* what comes goes here; NULL: nowhere */
    const uint8_t *data; /* goes there when it is asked for; NULL otherwise */
    uint8_t *copy;       /* data, of an abandoned command */
    uint32_t expected;   /* bytes, from there or asked for */
    uint32_t moved;      /* bytes received, or asked for */
    uint32_t r2ts;
    uint32_t unsent; /* segments of its data */
    uint16_t cid;
    bool damaged;
};

int us_nvme_open(struct us_nvme_queue **out, const struct us_nvme_form *form);
void us_nvme_close(struct us_nvme_queue *queue);

/* Queues a command with CDW10 to CDW15, `length` bytes of `data` to go along or as many to come `into`; returns its CID,
 * -EBUSY where no more may be outstanding, or -ENOMEM. */
int us_nvme_submit(struct us_nvme_queue *queue, uint8_t opcode, uint32_t nsid, const uint8_t *cdw, const uint8_t *data,
                   uint8_t *into, uint32_t length);
/* Touches the command's buffer no more; the command goes on.  0, -ENOENT or -ENOMEM. */
int us_nvme_abandon(struct us_nvme_queue *queue, uint16_t cid);

/* Where the next received bytes belong. */
void us_nvme_room(struct us_nvme_queue *queue, struct us_nvme_room *room);
/* Takes bytes that were put there.  Completions go to `done`, which has room for `capacity` of them, each as two numbers:
 * the CID | status << 16, and the result.  Returns US_NVME_COUNT and flags, or -ENOMEM. */
int us_nvme_take(struct us_nvme_queue *queue, uint32_t count, uint64_t *done);
/* Receives from a socket until it has no more, or enough for one turn; the same, or -errno. */
int us_nvme_receive(struct us_nvme_queue *queue, int fd, uint64_t *done);
/* Sends, and looks for answers until one has completed a command, or for `wait` nanoseconds; others may run on this CPU meanwhile,
 * among which the target may be.  The same. */
int us_nvme_exchange(struct us_nvme_queue *queue, int fd, uint32_t wait, uint64_t *done);
/* Sends to a socket as much as it takes; 1 when something is left, 0, or -errno. */
int us_nvme_send(struct us_nvme_queue *queue, int fd);

/* --- for Python's machine --- */

struct us_nvme_piece {
    const uint8_t *bytes;
    uint64_t offset; /* in the data of command `cid`; a `cid` of -1: it is not a command's data, or a copy */
    uint32_t length;
    int32_t cid;
};

/* The `number`th of the pieces that are to be sent, in order; false: there are no more. */
bool us_nvme_piece(struct us_nvme_queue *queue, uint32_t number, struct us_nvme_piece *piece);
/* Counts bytes as sent. */
void us_nvme_sent(struct us_nvme_queue *queue, size_t bytes);
/* How it was opened, with what changed since: next_cid, largest, start, end. */
const struct us_nvme_form *us_nvme_form(const struct us_nvme_queue *queue);
/* An outstanding command, or NULL. */
const struct us_nvme_command *us_nvme_command(const struct us_nvme_queue *queue, uint16_t cid);
#endif
