# What holds where this is the project itself and not a part of another one.

if(NOT CMAKE_BUILD_TYPE AND NOT CMAKE_CONFIGURATION_TYPES)
  set(CMAKE_BUILD_TYPE Release CACHE STRING "Build type" FORCE)
endif()
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY "${PROJECT_BINARY_DIR}/bin")
set(CMAKE_LIBRARY_OUTPUT_DIRECTORY "${PROJECT_BINARY_DIR}/lib")
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)

# A file on LibTorch takes more than 1 GB to compile: no more at once than the memory holds.
cmake_host_system_information(RESULT memory QUERY TOTAL_PHYSICAL_MEMORY)
math(EXPR compile_jobs "${memory} / 2000 + 1")
set_property(GLOBAL PROPERTY JOB_POOLS lora_compile=${compile_jobs})
set(CMAKE_JOB_POOL_COMPILE lora_compile)

find_program(LORA_CCACHE ccache)
mark_as_advanced(LORA_CCACHE)
if(LORA_CCACHE AND NOT CMAKE_CXX_COMPILER_LAUNCHER)
  # Without this setting files that use a precompiled header are never found again.
  set(CMAKE_CXX_COMPILER_LAUNCHER "${CMAKE_COMMAND}" -E env CCACHE_SLOPPINESS=pch_defines,time_macros "${LORA_CCACHE}")
endif()

# The API reference: cmake --build --preset release --target docs
add_custom_target(docs COMMAND "${CMAKE_COMMAND}" -D "LORA_DEPS_DIR=${LORA_DEPS_DIR}"
                               -P "${PROJECT_SOURCE_DIR}/cmake/LoraDocs.cmake"
                  USES_TERMINAL VERBATIM COMMENT "Building the API reference")
