# libedge_bcs: the C interface of runtime/native/include/edge_bcs.h, and what finds it where it is installed.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

file(STRINGS ${CMAKE_CURRENT_SOURCE_DIR}/runtime/native/include/edge_bcs.h abi REGEX "define EDGE_BCS_ABI_VERSION")
string(REGEX REPLACE "[^0-9]" "" abi "${abi}")
string(REGEX MATCH "^[0-9]+[.][0-9]+[.][0-9]+" release "${EDGE_BCS_VERSION}")

add_library(edge_bcs SHARED ${EDGE_BCS_OBJECTS})
add_library(edge_bcs::edge_bcs ALIAS edge_bcs)
target_include_directories(edge_bcs INTERFACE $<BUILD_INTERFACE:${CMAKE_CURRENT_SOURCE_DIR}/runtime/native/include>
                           $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>)
target_link_libraries(edge_bcs PRIVATE Threads::Threads)
set_target_properties(edge_bcs PROPERTIES LINKER_LANGUAGE CXX VERSION ${abi}.0.0 SOVERSION ${abi})

install(TARGETS edge_bcs EXPORT edge_bcs_targets LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT c
        NAMELINK_COMPONENT c)
install(FILES ${CMAKE_CURRENT_SOURCE_DIR}/runtime/native/include/edge_bcs.h
        DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} COMPONENT c)

# From where the file lies, so that what is installed may be moved.
file(RELATIVE_PATH prefix /${CMAKE_INSTALL_LIBDIR}/pkgconfig /)
configure_file(${CMAKE_CURRENT_LIST_DIR}/edge_bcs.pc.in ${CMAKE_CURRENT_BINARY_DIR}/edge_bcs.pc @ONLY)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/edge_bcs.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig COMPONENT c)

set(package ${CMAKE_INSTALL_LIBDIR}/cmake/edge_bcs)
install(EXPORT edge_bcs_targets FILE edge_bcs-config.cmake NAMESPACE edge_bcs:: DESTINATION ${package} COMPONENT c)
write_basic_package_version_file(${CMAKE_CURRENT_BINARY_DIR}/edge_bcs-config-version.cmake VERSION ${release}
                                 COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/edge_bcs-config-version.cmake DESTINATION ${package} COMPONENT c)
