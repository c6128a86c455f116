# One consumer project from nothing: cmake -D WAY=<folder of consumer/> -D ... -P consumer.cmake
#   WAY              find_package, add_subdirectory or fetch_content
#   LORA_SOURCE_DIR  this source tree;  LORA_BINARY_DIR  its configured build folder, which is installed from
#   WORK             an empty folder to work in
#   OPTIONS          what the consumer and the library are configured with, separated by |
#   DEPS_DIR         the folder of what was brought in for the library
#   BRING_JSON       if ON, the library is configured and installed where no system has nlohmann/json
cmake_minimum_required(VERSION 3.25)

function(run)
  list(JOIN ARGN " " command)
  message(STATUS "${command}")
  execute_process(COMMAND ${ARGN} COMMAND_ERROR_IS_FATAL ANY)
endfunction()

string(REPLACE "|" ";" options "${OPTIONS}")
file(REMOVE_RECURSE "${WORK}")
file(MAKE_DIRECTORY "${WORK}")

if(BRING_JSON)
  list(APPEND options -DCMAKE_DISABLE_FIND_PACKAGE_nlohmann_json=ON)
  set(LORA_BINARY_DIR "${WORK}/library")
  run("${CMAKE_COMMAND}" -S "${LORA_SOURCE_DIR}" -B "${LORA_BINARY_DIR}" ${options} "-DLORA_DEPS_DIR=${DEPS_DIR}"
      -DLORA_BUILD_TESTS=OFF -DLORA_BUILD_EXAMPLES=OFF -DLORA_BUILD_BENCHMARKS=OFF)
  file(STRINGS "${LORA_BINARY_DIR}/CMakeCache.txt" searched REGEX "GTest|GTEST|CLI11|PCRE2|benchmark_DIR")
  if(searched)
    message(FATAL_ERROR "with tests, examples and benchmarks off this was looked for: ${searched}")
  endif()
endif()

if(WAY STREQUAL "find_package")
  run("${CMAKE_COMMAND}" --install "${LORA_BINARY_DIR}" --prefix "${WORK}/first")
  # The package works wherever it is moved to.
  file(RENAME "${WORK}/first" "${WORK}/prefix")
  file(GLOB_RECURSE installed "${WORK}/prefix/*.cmake")
  foreach(file IN LISTS installed)
    file(STRINGS "${file}" absolute REGEX "${WORK}|${LORA_SOURCE_DIR}/")
    if(absolute)
      message(FATAL_ERROR "${file} holds a path of this machine: ${absolute}")
    endif()
  endforeach()
  if(EXISTS "${WORK}/prefix/bin/lora")  # not where the examples were not built
    run("${WORK}/prefix/bin/lora" --help)
  endif()
  list(APPEND options "-Dlora_ROOT=${WORK}/prefix")
else()
  list(APPEND options "-DLORA_SOURCE_DIR=${LORA_SOURCE_DIR}" "-DLORA_DEPS_DIR=${DEPS_DIR}")
endif()

run("${CMAKE_COMMAND}" -S "${CMAKE_CURRENT_LIST_DIR}/consumer/${WAY}" -B "${WORK}/build" ${options})
run("${CMAKE_COMMAND}" --build "${WORK}/build")
run("${WORK}/build/consumer" "${WORK}/adapter")
file(REMOVE_RECURSE "${WORK}")
