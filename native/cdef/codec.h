enum us_codec { US_CODEC_NONE, US_CODEC_LZ4, US_CODEC_ZSTD, ... };

int us_codec_open(int codec, const char *path);
int us_codec_is_open(int codec);
const char *us_codec_path(int codec);
const char *us_codec_version(int codec);
int us_compress(int codec, int level, const void *page, void *out, uint32_t room);
int us_decompress(int codec, const void *data, uint32_t length, void *page);
