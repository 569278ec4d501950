/* As much of the CUDA driver as Mosaic GPU asks before it calls ptxas: there is one H100. */
#include <string.h>

int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuDeviceGet(int *device, int index) { *device = 0; return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuCtxGetDevice(int *device) { *device = 0; return 0; }
int cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)1; return 0; }
int cuDeviceGetName(char *name, int size, int device) { strncpy(name, "NVIDIA H100", size); return 0; }
int cuGetErrorName(int error, const char **text) { *text = "error"; return 0; }
int cuGetErrorString(int error, const char **text) { *text = "an error"; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) {
    case 75: *value = 9; return 0;       /* compute capability, major */
    case 76: *value = 0; return 0;       /* minor */
    case 16: *value = 132; return 0;     /* multiprocessors */
    case 97: *value = 232448; return 0;  /* shared memory of a block, opted in */
    case 8: *value = 49152; return 0;    /* shared memory of a block */
    default: *value = 1; return 0;
  }
}
