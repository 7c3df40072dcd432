/* Compression of single pages by liblz4 or libzstd, opened at run time.
 *
 * No development packages: the prototypes are our own, the libraries are found by dlopen.  A codec is opened once a process
 * and never closed; after that, compress and decompress are safe from any thread, each with working memory of its own.
 * Nothing here knows where a compressed page is kept.
 */
#ifndef US_CODEC_H
#define US_CODEC_H
#include <stdint.h>

#define US_CODEC_PAGE 4096u


enum us_codec {
    US_CODEC_NONE, /* keeps every page as it is; always open */
    US_CODEC_LZ4,
    US_CODEC_ZSTD,
    US_CODECS
};

/* Open a codec's library: `path`, or where that is NULL its usual name.  0 also when it was open already (from wherever);
 * -ENOENT: cannot be loaded; -ENOSYS: loaded, but functions are missing; -EINVAL: no such codec. */
int us_codec_open(int codec, const char *path);

/* 1 when open. */
int us_codec_is_open(int codec);

/* The library in use and its own version; NULL while the codec is not open, and for US_CODEC_NONE. */
const char *us_codec_path(int codec);
const char *us_codec_version(int codec);

/* Compress one page into at most `room` bytes: the bytes used, 0 where they do not suffice, -ENOMEM.  `level` is zstd's level
 * or lz4's acceleration. */
int us_compress(int codec, int level, const void *page, void *out, uint32_t room);

/* The page that `length` bytes hold: 0, -EILSEQ where they do not decode to exactly one page, -ENOMEM. */
int us_decompress(int codec, const void *data, uint32_t length, void *page);
#endif
