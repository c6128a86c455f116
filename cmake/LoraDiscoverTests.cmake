# lora_discover_tests(program prefix [property value...]) gives ctest one test, PREFIX.SUITE, for every suite of a
# GoogleTest program. Not one for every test: LibTorch takes half a second to load, and there are hundreds.

if(CMAKE_SCRIPT_MODE_FILE)
  # After the program is built: PROGRAM, PREFIX and PROPERTIES (separated by |) become the ctest script OUTPUT.
  execute_process(COMMAND "${PROGRAM}" --gtest_list_tests OUTPUT_VARIABLE listed COMMAND_ERROR_IS_FATAL ANY)
  string(REGEX MATCHALL "(^|\n)[A-Za-z0-9_/]+\\.( |\n|$)" suites "${listed}")
  string(REPLACE "|" " " properties "${PROPERTIES}")
  set(script "")
  foreach(suite IN LISTS suites)
    string(REGEX REPLACE "[ \n]|\\.[ \n]*$" "" suite "${suite}")
    set(name "[==[${PREFIX}.${suite}]==]")
    string(APPEND script "add_test(${name} [==[${PROGRAM}]==] [==[--gtest_filter=${suite}.*]==])\n"
                         "set_tests_properties(${name} PROPERTIES ${properties})\n")
  endforeach()
  if(NOT script)
    message(FATAL_ERROR "${PROGRAM} lists no tests")
  endif()
  file(WRITE "${OUTPUT}" "${script}")
  return()
endif()

function(lora_discover_tests program prefix)
  set(script "${CMAKE_CURRENT_BINARY_DIR}/${program}_tests.cmake")
  list(JOIN ARGN "|" properties)
  add_custom_command(
    TARGET ${program} POST_BUILD BYPRODUCTS "${script}"
    COMMAND "${CMAKE_COMMAND}" -D "PROGRAM=$<TARGET_FILE:${program}>" -D PREFIX=${prefix}
            -D "PROPERTIES=TIMEOUT|900|${properties}" -D "OUTPUT=${script}"
            -P "${CMAKE_CURRENT_FUNCTION_LIST_FILE}"
    VERBATIM)
  # A program that is not built is a failing test, not a missing one.
  set(include "${CMAKE_CURRENT_BINARY_DIR}/${program}_include.cmake")
  file(WRITE "${include}" "if(EXISTS [==[${script}]==])\n  include([==[${script}]==])\nelse()\n"
                          "  add_test([==[${prefix}.NOT_BUILT]==] [==[${program}_NOT_BUILT]==])\nendif()\n")
  set_property(DIRECTORY APPEND PROPERTY TEST_INCLUDE_FILES "${include}")
endfunction()
