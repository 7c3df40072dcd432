/* The layout of NVMe over TCP that the queue's hot loop needs; backends/nvme_tcp/pdu.py and command.py have all of it.
 *
 * All fields are little-endian on the wire and are read and written as the CPU has them.
 */
#ifndef US_NVME_PDU_H
#define US_NVME_PDU_H
#include <assert.h>
#include <stddef.h>
#include <stdint.h>

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "a CPU with the order of bytes of the wire");

enum { US_PDU_CAPSULE_CMD = 4, US_PDU_CAPSULE_RESP = 5, US_PDU_H2C_DATA = 6, US_PDU_C2H_DATA = 7, US_PDU_R2T = 9 };
enum { US_PDU_HDGST = 1, US_PDU_DDGST = 2, US_PDU_LAST = 4, US_PDU_SUCCESS = 8 };
enum { US_NVME_BY_SGL = 0x40, US_NVME_SGL_IN_CAPSULE = 0x01, US_NVME_SGL_TRANSPORT = 0x5a };
enum { US_NVME_TRANSIENT_TRANSPORT = 0x022 };
#define US_PDU_DIGEST 4u
#define US_PDU_ALIGNMENT_MAX 128u
#define US_NVME_CDW 24u /* CDW10 to CDW15 */

struct us_pdu_common {
    uint8_t type, flags, hlen, pdo;
    uint32_t plen;
};

struct us_nvme_sqe {
    uint8_t opcode, flags;
    uint16_t cid;
    uint32_t nsid;
    uint8_t reserved[16];
    uint64_t address;
    uint32_t length;
    uint8_t reserved_sgl[3], sgl;
    uint8_t cdw[US_NVME_CDW];
};

struct us_nvme_cqe {
    uint64_t result;
    uint16_t head, queue, cid, status; /* bit 0 of status is the phase, which Fabrics do not use */
};

struct us_pdu_transfer { /* C2HData, H2CData, R2T */
    uint16_t cid, tag;
    uint32_t offset, length, reserved;
};

#define US_PDU_HLEN ((uint32_t)(sizeof(struct us_pdu_common) + sizeof(struct us_nvme_cqe))) /* of all that a host receives */

static_assert(sizeof(struct us_pdu_common) == 8 && offsetof(struct us_pdu_common, plen) == 4, "the common header");
static_assert(sizeof(struct us_nvme_sqe) == 64 && offsetof(struct us_nvme_sqe, address) == 24 &&
                  offsetof(struct us_nvme_sqe, sgl) == 39 && offsetof(struct us_nvme_sqe, cdw) == 40,
              "a submission queue entry");
static_assert(sizeof(struct us_nvme_cqe) == 16 && offsetof(struct us_nvme_cqe, cid) == 12, "a completion queue entry");
static_assert(sizeof(struct us_pdu_transfer) == 16 && offsetof(struct us_pdu_transfer, length) == 8, "a transfer");
#endif
