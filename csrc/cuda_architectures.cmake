# The GPU architectures that the CUDA kernels are compiled for. Separate from CMakeLists.txt so that
# tests/afa_ext/test_build.py can call these functions without a compiler.

# Required by the kernels: asynchronous copies to shared memory (cp.async).
set(AFA_OLDEST_ARCHITECTURE 80)
# Without a visible GPU and without TORCH_CUDA_ARCH_LIST: one architecture for each kind of GPU in use, if nvcc supports
# it. A binary also runs on later architectures of the same major version (8.7, 10.3, 12.1).
set(AFA_USUAL_ARCHITECTURES 80 86 89 90 100 120)
# The names that torch accepts in TORCH_CUDA_ARCH_LIST.
set(AFA_NAMED_Kepler "3.5+PTX")
set(AFA_NAMED_Maxwell "5.0 5.2+PTX")
set(AFA_NAMED_Pascal "6.0 6.1+PTX")
set(AFA_NAMED_Volta "7.0+PTX")
set(AFA_NAMED_Turing "7.5+PTX")
set(AFA_NAMED_Ampere "8.0 8.6+PTX")
set(AFA_NAMED_Ada "8.9+PTX")
set(AFA_NAMED_Hopper "9.0+PTX")
set(AFA_NAMED_Blackwell "10.0 12.0+PTX")

# Sets `result` to the compute capabilities of the GPUs that the driver reports, such as 80;90; empty without a driver.
function(afa_visible_gpus result)
  execute_process(COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader
                  OUTPUT_VARIABLE listed ERROR_QUIET RESULT_VARIABLE failed)
  set(gpus "")
  if(NOT failed)
    string(REGEX MATCHALL "[0-9]+\\.[0-9]+" gpus "${listed}")
    list(TRANSFORM gpus REPLACE "\\." "")
    list(REMOVE_DUPLICATES gpus)
  endif()
  set(${result} "${gpus}" PARENT_SCOPE)
endfunction()

# Sets `result` to a list for CUDA_ARCHITECTURES. `requested`: TORCH_CUDA_ARCH_LIST, may be empty. `known`: the targets
# of nvcc, such as 80;90;120. `visible`: this machine's GPUs.
function(afa_cuda_architectures result requested known visible)
  list(SORT known COMPARE NATURAL)
  set(architectures "")

  # 1. Requested by the user: "8.0;9.0a 12.0+PTX" -> 80-real;90a-real;120
  string(REGEX REPLACE "[ ,;]+" ";" entries "${requested}")
  set(listed "")
  foreach(entry IN LISTS entries)
    if(DEFINED AFA_NAMED_${entry})
      string(REPLACE " " ";" entry "${AFA_NAMED_${entry}}")
    endif()
    list(APPEND listed ${entry})
  endforeach()
  foreach(entry IN LISTS listed)
    if(NOT entry MATCHES "^([0-9]+)\\.([0-9])([af]?)(\\+PTX)?$")
      message(FATAL_ERROR "TORCH_CUDA_ARCH_LIST must list architectures such as 8.0, 9.0+PTX or Hopper, got '${entry}'")
    endif()
    set(number "${CMAKE_MATCH_1}${CMAKE_MATCH_2}")
    set(kind "-real")
    if(CMAKE_MATCH_4)
      set(kind "")
    endif()
    set(suffix "${CMAKE_MATCH_3}")
    if(number LESS AFA_OLDEST_ARCHITECTURE)
      message(WARNING "TORCH_CUDA_ARCH_LIST: ${entry} is ignored; the kernels need compute capability 8.0 or later")
    else()
      list(APPEND architectures "${number}${suffix}${kind}")
    endif()
  endforeach()

  # 2. The GPUs of this machine. A GPU that nvcc doesn't support yet runs the PTX of the newest earlier architecture.
  if(NOT architectures)
    set(newer FALSE)
    foreach(gpu IN LISTS visible)
      if(gpu LESS AFA_OLDEST_ARCHITECTURE)
        message(WARNING "the GPU of compute capability ${gpu} can't run the kernels, which need 80 or later")
      elseif(gpu IN_LIST known)
        list(APPEND architectures "${gpu}-real")
      else()
        set(newer TRUE)
      endif()
    endforeach()
    if(newer)
      list(GET known -1 newest)
      list(REMOVE_ITEM architectures "${newest}-real")
      list(APPEND architectures "${newest}")
    endif()
  endif()

  # 3. All usual architectures. The last one's PTX is for later GPUs; that of 10.0 is for 11.0, which has no binary.
  if(NOT architectures)
    foreach(number IN LISTS AFA_USUAL_ARCHITECTURES)
      if(number IN_LIST known)
        list(APPEND architectures "${number}-real")
      endif()
    endforeach()
    if(NOT architectures)
      message(FATAL_ERROR "this nvcc supports none of ${AFA_USUAL_ARCHITECTURES}; set TORCH_CUDA_ARCH_LIST")
    endif()
    list(TRANSFORM architectures REPLACE "^100-real$" "100")
    list(TRANSFORM architectures REPLACE "-real$" "" AT -1)
  endif()
  list(REMOVE_DUPLICATES architectures)
  set(${result} "${architectures}" PARENT_SCOPE)
endfunction()
