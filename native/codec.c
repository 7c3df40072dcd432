#define _GNU_SOURCE
#include "codec.h"
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

static struct {
    int (*size_of_state)(void);
    int (*compress)(void *state, const char *source, char *out, int length, int room, int acceleration);
    int (*decompress)(const char *source, char *out, int length, int room);
    const char *(*version)(void);
} lz4;

static struct {
    void *(*new_compressor)(void);
    void *(*new_decompressor)(void);
    size_t (*free_compressor)(void *context);
    size_t (*free_decompressor)(void *context);
    size_t (*compress)(void *context, void *out, size_t room, const void *source, size_t length, int level);
    size_t (*decompress)(void *context, void *out, size_t room, const void *source, size_t length);
    unsigned (*is_error)(size_t code);
    const char *(*version)(void);
} zstd;

struct symbol {
    const char *name;
    void *place;
};

static const struct symbol lz4_symbols[] = {
    {"LZ4_sizeofState", &lz4.size_of_state},
    /* with the caller's state: 16 KiB less of stack for the thread that serves faults */
    {"LZ4_compress_fast_extState", &lz4.compress},
    {"LZ4_decompress_safe", &lz4.decompress},
    {"LZ4_versionString", &lz4.version},
    {NULL, NULL},
};

static const struct symbol zstd_symbols[] = {
    {"ZSTD_createCCtx", &zstd.new_compressor},
    {"ZSTD_createDCtx", &zstd.new_decompressor},
    {"ZSTD_freeCCtx", &zstd.free_compressor},
    {"ZSTD_freeDCtx", &zstd.free_decompressor},
    {"ZSTD_compressCCtx", &zstd.compress},
    {"ZSTD_decompressDCtx", &zstd.decompress},
    {"ZSTD_isError", &zstd.is_error},
    {"ZSTD_versionString", &zstd.version},
    {NULL, NULL},
};

static struct library {
    const char *usual_name;
    const struct symbol *symbols;
    char *path;
    _Atomic int open; /* set last: whoever sees it sees the functions */
} libraries[US_CODECS] = {
    [US_CODEC_NONE] = {.open = 1},
    [US_CODEC_LZ4] = {.usual_name = "liblz4.so.1", .symbols = lz4_symbols},
    [US_CODEC_ZSTD] = {.usual_name = "libzstd.so.1", .symbols = zstd_symbols},
};

static pthread_mutex_t opening = PTHREAD_MUTEX_INITIALIZER;

/* What one thread needs to compress and decompress; made when first needed, freed when the thread ends. */
struct workplace {
    void *lz4_state;
    void *compressor;
    void *decompressor;
};

static pthread_key_t workplace_key;
static pthread_once_t workplace_once = PTHREAD_ONCE_INIT;
static int workplace_error;

static void leave_workplace(void *given) {
    struct workplace *own = given;
    free(own->lz4_state);
    if (own->compressor)
        zstd.free_compressor(own->compressor);
    if (own->decompressor)
        zstd.free_decompressor(own->decompressor);
    free(own);
}

static void make_key(void) { workplace_error = -pthread_key_create(&workplace_key, leave_workplace); }

static struct workplace *workplace(void) {
    pthread_once(&workplace_once, make_key);
    if (workplace_error)
        return NULL;
    struct workplace *own = pthread_getspecific(workplace_key);
    if (own)
        return own;
    own = calloc(1, sizeof *own);
    if (own && pthread_setspecific(workplace_key, own)) {
        free(own);
        return NULL;
    }
    return own;
}

static int load(struct library *library, const char *path) {
    void *handle = dlopen(path ? path : library->usual_name, RTLD_LAZY | RTLD_LOCAL);
    if (!handle)
        return -ENOENT;
    for (const struct symbol *symbol = library->symbols; symbol->name; symbol++) {
        void *function = dlsym(handle, symbol->name);
        if (!function) {
            dlclose(handle);
            return -ENOSYS;
        }
        memcpy(symbol->place, &function, sizeof function);
    }
    Dl_info found;
    void *any = dlsym(handle, library->symbols[0].name);
    library->path = strdup(dladdr(any, &found) && found.dli_fname ? found.dli_fname : library->usual_name);
    atomic_store_explicit(&library->open, 1, memory_order_release);
    return 0;
}

int us_codec_open(int codec, const char *path) {
    if (codec < 0 || codec >= US_CODECS)
        return -EINVAL;
    pthread_mutex_lock(&opening);
    int rc = us_codec_is_open(codec) ? 0 : load(&libraries[codec], path);
    pthread_mutex_unlock(&opening);
    return rc;
}

int us_codec_is_open(int codec) {
    return codec >= 0 && codec < US_CODECS && atomic_load_explicit(&libraries[codec].open, memory_order_acquire);
}

const char *us_codec_path(int codec) { return us_codec_is_open(codec) ? libraries[codec].path : NULL; }

const char *us_codec_version(int codec) {
    if (!us_codec_is_open(codec) || codec == US_CODEC_NONE)
        return NULL;
    return codec == US_CODEC_LZ4 ? lz4.version() : zstd.version();
}

static int compress_lz4(int acceleration, const void *page, void *out, uint32_t room) {
    struct workplace *own = workplace();
    if (own && !own->lz4_state)
        own->lz4_state = malloc((size_t)lz4.size_of_state());
    if (!own || !own->lz4_state)
        return -ENOMEM;
    return lz4.compress(own->lz4_state, page, out, US_CODEC_PAGE, (int)room, acceleration);
}

static int compress_zstd(int level, const void *page, void *out, uint32_t room) {
    struct workplace *own = workplace();
    if (own && !own->compressor)
        own->compressor = zstd.new_compressor();
    if (!own || !own->compressor)
        return -ENOMEM;
    size_t length = zstd.compress(own->compressor, out, room, page, US_CODEC_PAGE, level);
    return zstd.is_error(length) ? 0 : (int)length;
}

int us_compress(int codec, int level, const void *page, void *out, uint32_t room) {
    switch (codec) {
    case US_CODEC_LZ4:
        return compress_lz4(level, page, out, room);
    case US_CODEC_ZSTD:
        return compress_zstd(level, page, out, room);
    default:
        return 0;
    }
}

int us_decompress(int codec, const void *data, uint32_t length, void *page) {
    if (codec == US_CODEC_NONE || !us_codec_is_open(codec))
        return -EILSEQ;
    if (codec == US_CODEC_LZ4)
        return lz4.decompress(data, page, (int)length, US_CODEC_PAGE) == (int)US_CODEC_PAGE ? 0 : -EILSEQ;
    struct workplace *own = workplace();
    if (own && !own->decompressor)
        own->decompressor = zstd.new_decompressor();
    if (!own || !own->decompressor)
        return -ENOMEM;
    return zstd.decompress(own->decompressor, page, US_CODEC_PAGE, data, length) == US_CODEC_PAGE ? 0 : -EILSEQ;
}
