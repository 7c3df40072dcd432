/* CRC-32C (Castagnoli), the digest of NVMe/TCP's headers and data.
 *
 * The CPU's own instruction where it has one, else tables of eight bytes at a time.  Nothing here knows what is digested.
 */
#ifndef US_CRC32C_H
#define US_CRC32C_H
#include <stddef.h>
#include <stdint.h>

/* The checksum of `length` more bytes after those whose checksum is `crc`; 0 begins. */
uint32_t us_crc32c(uint32_t crc, const void *data, size_t length);

/* The same by tables alone: what CPUs without the instruction take, and what the tests hold the instruction to. */
uint32_t us_crc32c_tables(uint32_t crc, const void *data, size_t length);
#endif
