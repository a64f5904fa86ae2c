// A libcuda.so.1 without a GPU: the functions that Triton's driver and launchers call. It loads real machine code and
// records launches, with their parameters, instead of running them.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MOST_PARAMETERS 256
#define MOST_LAUNCHES 1024
#define MULTIPROCESSORS 132

typedef struct {
  unsigned grid[3], block[3], shared_bytes;
  void *stream, *attributes;
  unsigned attribute_count;
} Config;  // CUlaunchConfig

typedef struct {
  char name[256];
  int registers, parameters;
  uint32_t size[MOST_PARAMETERS];
} Function;

typedef struct {
  const Function *function;
  unsigned grid[3], block[3], shared_bytes;
  uint64_t values[MOST_PARAMETERS];
} Launch;

static Launch launches[MOST_LAUNCHES];
static long launch_count = 0;
static int capability[2] = {9, 0};

// What Python asks of it.
void fake_capability(int major, int minor) { capability[0] = major, capability[1] = minor; }
void fake_forget(void) { launch_count = 0; }
long fake_launches(void) { return launch_count; }
const char *fake_name(long i) { return launches[i].function->name; }
int fake_registers(long i) { return launches[i].function->registers; }
int fake_parameters(long i) { return launches[i].function->parameters; }
unsigned fake_size(long i, int parameter) { return launches[i].function->size[parameter]; }
uint64_t fake_value(long i, int parameter) { return launches[i].values[parameter]; }
void fake_dimensions(long i, unsigned *grid, unsigned *block, unsigned *shared_bytes) {
  memcpy(grid, launches[i].grid, sizeof launches[i].grid);
  memcpy(block, launches[i].block, sizeof launches[i].block);
  *shared_bytes = launches[i].shared_bytes;
}

typedef struct {
  unsigned char magic[16];
  uint16_t type, machine;
  uint32_t version;
  uint64_t entry, programs, sections;
  uint32_t flags;
  uint16_t size, program_size, program_count, section_size, section_count, names;
} ElfHeader;
typedef struct {
  uint32_t name, type;
  uint64_t flags, address, offset, size;
  uint32_t link, info;
  uint64_t alignment, entry_size;
} ElfSection;

// The section .nv.info.KERNEL has an entry for each parameter, with the attribute EIATTR_KPARAM_INFO (0x17) or its
// second version (0x45).
static void read_parameters(Function *function, const uint8_t *image) {
  const ElfHeader *header = (const ElfHeader *)image;
  const ElfSection *sections = (const ElfSection *)(image + header->sections);
  const char *names = (const char *)(image + sections[header->names].offset);
  char info[300], text[300];
  snprintf(info, sizeof info, ".nv.info.%s", function->name);
  snprintf(text, sizeof text, ".text.%s", function->name);
  for (int i = 0; i < header->section_count; i++) {
    const char *name = names + sections[i].name;
    if (!strcmp(name, text)) function->registers = sections[i].info >> 24;
    if (strcmp(name, info)) continue;
    const uint8_t *entry = image + sections[i].offset, *end = entry + sections[i].size;
    while (entry + 4 <= end) {
      int has_payload = entry[0] == 4, attribute = entry[1];
      if (has_payload && (attribute == 0x17 || attribute == 0x45)) {
        const uint32_t *words = (const uint32_t *)(entry + 4);
        uint32_t ordinal = words[1] & 0xffff;
        if (ordinal >= MOST_PARAMETERS) abort();
        function->size[ordinal] = words[2] >> 18;
        if ((int)ordinal >= function->parameters) function->parameters = ordinal + 1;
      }
      entry += 4 + (has_payload ? *(const uint16_t *)(entry + 2) : 0);
    }
  }
}

int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { return *version = 13000, 0; }
int cuGetErrorString(int error, const char **text) { return *text = "an error of the fake driver", 0; }
int cuGetErrorName(int error, const char **text) { return *text = "FAKE", 0; }
int cuDeviceGet(int *device, int index) { return *device = index, 0; }
int cuDeviceGetCount(int *count) { return *count = 1, 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  int is_ampere = capability[0] == 8;
  switch (attribute) {
    case 8: return *value = 48 << 10, 0;  // shared memory of a block
    case 10: return *value = 32, 0;  // threads of a warp
    case 12: return *value = 65536, 0;  // registers
    case 16: return *value = MULTIPROCESSORS, 0;
    case 75: return *value = capability[0], 0;
    case 76: return *value = capability[1], 0;
    case 81: return *value = (is_ampere ? 164 : 228) << 10, 0;  // shared memory of a multiprocessor
    case 97: return *value = (is_ampere ? 163 : 227) << 10, 0;  // shared memory of a block that asks for it
    default: return *value = 1, 0;
  }
}

static int context;
int cuCtxGetCurrent(void **current) { return *current = &context, 0; }
int cuCtxSetCurrent(void *current) { return 0; }
int cuCtxGetDevice(int *device) { return *device = 0, 0; }
int cuCtxGetLimit(size_t *value, int limit) { return *value = 1 << 20, 0; }
int cuCtxSetLimit(int limit, size_t value) { return 0; }
int cuDevicePrimaryCtxRetain(void **retained, int device) { return *retained = &context, 0; }

// A module is its image, copied because the caller frees it.
int cuModuleLoadData(void **module, const void *image) {
  const ElfHeader *header = image;
  if (memcmp(image, "\177ELF", 4)) return 200;  // invalid image
  const ElfSection *sections = (const ElfSection *)((const char *)image + header->sections);
  size_t size = header->sections + (size_t)header->section_size * header->section_count;
  for (int i = 0; i < header->section_count; i++) {
    size_t end = sections[i].offset + sections[i].size;
    if (sections[i].type != 8 && end > size) size = end;  // 8: a section without bytes in the file
  }
  return memcpy(*module = malloc(size), image, size), 0;
}
int cuModuleUnload(void *module) { return 0; }
int cuModuleGetFunction(void **function, void *module, const char *name) {
  Function *found = calloc(1, sizeof *found);
  snprintf(found->name, sizeof found->name, "%s", name);
  read_parameters(found, module);
  return *function = found, 0;
}
int cuFuncGetAttribute(int *value, int attribute, const Function *function) {
  int registers = (function->registers + 7) / 8 * 8;
  int threads = registers ? 65536 / registers / 32 * 32 : 1024;
  switch (attribute) {
    case 0: return *value = threads < 1024 ? threads : 1024, 0;  // most threads of a block
    case 4: return *value = function->registers, 0;
    default: return *value = 0, 0;
  }
}
int cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }
int cuFuncSetCacheConfig(void *function, int config) { return 0; }
int cuStreamIsCapturing(void *stream, int *status) { return *status = 0, 0; }
int cuPointerGetAttribute(uint64_t *out, int attribute, uint64_t pointer) { return *out = pointer, 0; }
int cuOccupancyMaxActiveClusters(int *count, void *function, const Config *config) { return *count = 1, 0; }
int cuTensorMapEncodeTiled(void) { return 0; }
int cuTensorMapEncodeIm2col(void) { return 0; }

int cuLaunchKernelEx(const Config *config, const Function *function, void **parameters, void **extra) {
  if (launch_count == MOST_LAUNCHES) return 701;  // out of resources
  Launch *launch = &launches[launch_count++];
  memset(launch, 0, sizeof *launch);
  launch->function = function;
  memcpy(launch->grid, config->grid, sizeof launch->grid);
  memcpy(launch->block, config->block, sizeof launch->block);
  launch->shared_bytes = config->shared_bytes;
  for (int i = 0; i < function->parameters; i++) {
    uint32_t size = function->size[i];
    memcpy(&launch->values[i], parameters[i], size < 8 ? size : 8);
  }
  return 0;
}
int cuLaunchKernel(const Function *function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                   unsigned block_y, unsigned block_z, unsigned shared_bytes, void *stream, void **parameters,
                   void **extra) {
  Config config = {{grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, shared_bytes, stream, NULL, 0};
  return cuLaunchKernelEx(&config, function, parameters, extra);
}
