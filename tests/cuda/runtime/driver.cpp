// libcuda.so.1: the driver functions that torch looks up by name at startup. Calling a function that is not
// implemented aborts the process with the function's name.
#include <cstdio>
#include <cstdlib>

#define AFA_DRIVER_API extern "C" __attribute__((visibility("default"))) int

AFA_DRIVER_API cuInit(unsigned) {
  return 0;
}
AFA_DRIVER_API cuDriverGetVersion(int* version) {
  *version = 13000;
  return 0;
}
// torch calls this before it uses a device, to find out whether that would create a context.
AFA_DRIVER_API cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) {
  *flags = 0;
  *active = 1;
  return 0;
}
AFA_DRIVER_API cuCtxGetCurrent(void** context) {
  static int any;
  *context = &any;
  return 0;
}
AFA_DRIVER_API cuCtxSetCurrent(void*) {
  return 0;
}
AFA_DRIVER_API cuGetErrorString(int, const char** text) {
  *text = "error of the stand-in driver";
  return 0;
}

AFA_DRIVER_API cuLogsRegisterCallback(void*, void*, void*) {
  return 0;
}
AFA_DRIVER_API cuLogsUnregisterCallback(void*) {
  return 0;
}

#define AFA_NOT_IMPLEMENTED(name)                                               \
  AFA_DRIVER_API name() {                                                       \
    std::fprintf(stderr, "the stand-in driver does not implement " #name "\n"); \
    std::abort();                                                               \
  }
AFA_NOT_IMPLEMENTED(cuCtxFromGreenCtx)
AFA_NOT_IMPLEMENTED(cuCtxPopCurrent)
AFA_NOT_IMPLEMENTED(cuCtxPushCurrent)
AFA_NOT_IMPLEMENTED(cuDevResourceGenerateDesc)
AFA_NOT_IMPLEMENTED(cuDevSmResourceSplitByCount)
AFA_NOT_IMPLEMENTED(cuDeviceGet)
AFA_NOT_IMPLEMENTED(cuDeviceGetAttribute)
AFA_NOT_IMPLEMENTED(cuDeviceGetCount)
AFA_NOT_IMPLEMENTED(cuDeviceGetDevResource)
AFA_NOT_IMPLEMENTED(cuDevicePrimaryCtxRetain)
AFA_NOT_IMPLEMENTED(cuGetErrorName)
AFA_NOT_IMPLEMENTED(cuGetErrorString_)
AFA_NOT_IMPLEMENTED(cuGetProcAddress_v2)
AFA_NOT_IMPLEMENTED(cuGreenCtxCreate)
AFA_NOT_IMPLEMENTED(cuGreenCtxDestroy)
AFA_NOT_IMPLEMENTED(cuGreenCtxStreamCreate)
AFA_NOT_IMPLEMENTED(cuMemAddressFree)
AFA_NOT_IMPLEMENTED(cuMemAddressReserve)
AFA_NOT_IMPLEMENTED(cuMemCreate)
AFA_NOT_IMPLEMENTED(cuMemExportToShareableHandle)
AFA_NOT_IMPLEMENTED(cuMemGetAddressRange)
AFA_NOT_IMPLEMENTED(cuMemGetAllocationGranularity)
AFA_NOT_IMPLEMENTED(cuMemGetAllocationPropertiesFromHandle)
AFA_NOT_IMPLEMENTED(cuMemImportFromShareableHandle)
AFA_NOT_IMPLEMENTED(cuMemMap)
AFA_NOT_IMPLEMENTED(cuMemRelease)
AFA_NOT_IMPLEMENTED(cuMemRetainAllocationHandle)
AFA_NOT_IMPLEMENTED(cuMemSetAccess)
AFA_NOT_IMPLEMENTED(cuMemUnmap)
AFA_NOT_IMPLEMENTED(cuMemsetD32Async)
AFA_NOT_IMPLEMENTED(cuMulticastAddDevice)
AFA_NOT_IMPLEMENTED(cuMulticastBindMem)
AFA_NOT_IMPLEMENTED(cuMulticastCreate)
AFA_NOT_IMPLEMENTED(cuMulticastUnbind)
AFA_NOT_IMPLEMENTED(cuStreamWriteValue32)
