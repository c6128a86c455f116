# Builds the API reference by doxygen and fails on a warning, as a name without documentation:
#   cmake [-D LORA_DEPS_DIR=<folder>] [-D LORA_DOCS_DIR=<folder>] -P cmake/LoraDocs.cmake
# Where doxygen is not found, Debian's package and what it needs are brought into LORA_DEPS_DIR.
cmake_minimum_required(VERSION 3.25)
cmake_path(GET CMAKE_CURRENT_LIST_DIR PARENT_PATH source)
if(NOT LORA_DEPS_DIR)
  set(LORA_DEPS_DIR "${source}/build/deps")
endif()
if(NOT LORA_DOCS_DIR)
  set(LORA_DOCS_DIR "${source}/build/docs")
endif()
include("${CMAKE_CURRENT_LIST_DIR}/LoraFetch.cmake")
include("${CMAKE_CURRENT_LIST_DIR}/LoraVersion.cmake")
lora_read_version("${source}" version)

# Sets `result` to the names of Debian's `package` and all that it needs and that is not installed.
function(lora_missing_packages result package)
  set(lists)
  if(EXISTS "${LORA_DEPS_DIR}/debian/apt/lists")
    set(lists -o "Dir::State::Lists=${LORA_DEPS_DIR}/debian/apt/lists" -o "Dir::Cache=${LORA_DEPS_DIR}/debian/apt/cache")
  endif()
  execute_process(COMMAND apt-cache ${lists} depends --recurse --important ${package} OUTPUT_VARIABLE text ERROR_QUIET)
  string(REGEX MATCHALL "(^|\n)[a-z0-9][a-z0-9.+-]*" names "${text}")
  set(missing)
  foreach(name IN LISTS names)
    string(STRIP "${name}" name)
    execute_process(COMMAND dpkg-query --show --showformat "\${db:Status-Status}" ${name}
                    OUTPUT_VARIABLE status ERROR_QUIET)
    if(NOT status STREQUAL "installed")
      list(APPEND missing ${name})
    endif()
  endforeach()
  set(${result} "${missing}" PARENT_SCOPE)
endfunction()

find_program(LORA_DOXYGEN doxygen)
set(libraries "$ENV{LD_LIBRARY_PATH}")
if(NOT LORA_DOXYGEN)
  lora_fetch_debian(root doxygen "doxygen")
  set(LORA_DOXYGEN "${root}/usr/bin/doxygen")
  lora_missing_packages(packages doxygen)
  foreach(package IN LISTS packages)
    lora_fetch_debian(root ${package} "doxygen")
    file(GLOB folders "${root}/usr/lib/*-linux-gnu" "${root}/lib/*-linux-gnu" "${root}/usr/lib/llvm-*/lib")
    list(JOIN folders ":" folders)
    string(APPEND libraries ":${folders}")
  endforeach()
endif()

file(REMOVE_RECURSE "${LORA_DOCS_DIR}")
file(MAKE_DIRECTORY "${LORA_DOCS_DIR}")
execute_process(
  COMMAND "${CMAKE_COMMAND}" -E env "LD_LIBRARY_PATH=${libraries}" "LORA_VERSION=${version}"
          "LORA_DOCS_DIR=${LORA_DOCS_DIR}" "${LORA_DOXYGEN}" docs/Doxyfile
  WORKING_DIRECTORY "${source}" RESULT_VARIABLE status)
if(NOT status EQUAL 0)
  message(FATAL_ERROR "lora: the API reference has warnings, or doxygen failed (${status})")
endif()
message(STATUS "lora: the API reference is ${LORA_DOCS_DIR}/index.html")
