# `cmake --install`: the headers, the exported target and the module that finds LibTorch and nlohmann/json for it.
# Nothing that is installed holds a path of this machine.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

set(package_dir "${CMAKE_INSTALL_LIBDIR}/cmake/lora")
install(TARGETS lora EXPORT lora-targets FILE_SET HEADERS DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}")
install(EXPORT lora-targets NAMESPACE lora:: DESTINATION "${package_dir}")
# The sources of lora::cuda.
install(DIRECTORY "${PROJECT_SOURCE_DIR}/include/lora/cuda" DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}/lora"
        FILES_MATCHING PATTERN "*.cpp" PATTERN "*.cu" PATTERN "*.cuh")
if(LORA_BROUGHT_JSON_DIR)
  # Out of the way of a system's own: the package looks here only where it finds no other.
  install(DIRECTORY "${LORA_BROUGHT_JSON_DIR}" DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}/lora/third_party")
endif()

set(include_dir "${CMAKE_INSTALL_INCLUDEDIR}")
set(third_party_dir "${CMAKE_INSTALL_INCLUDEDIR}/lora/third_party")
configure_package_config_file(
  "${CMAKE_CURRENT_LIST_DIR}/lora-config.cmake.in" "${PROJECT_BINARY_DIR}/lora-config.cmake"
  INSTALL_DESTINATION "${package_dir}" PATH_VARS include_dir third_party_dir NO_CHECK_REQUIRED_COMPONENTS_MACRO)
write_basic_package_version_file("${PROJECT_BINARY_DIR}/lora-config-version.cmake"
                                 COMPATIBILITY SameMinorVersion ARCH_INDEPENDENT)
install(FILES "${PROJECT_BINARY_DIR}/lora-config.cmake" "${PROJECT_BINARY_DIR}/lora-config-version.cmake"
              "${CMAKE_CURRENT_LIST_DIR}/LoraDependencies.cmake" "${CMAKE_CURRENT_LIST_DIR}/LoraCuda.cmake"
        DESTINATION "${package_dir}")
install(FILES "${PROJECT_SOURCE_DIR}/LICENSE" DESTINATION "${CMAKE_INSTALL_DOCDIR}")
