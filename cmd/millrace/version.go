package main

import (
	"context"
	"fmt"
	"runtime"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

func versionCommand(s *settings) *cobra.Command {
	return command(&cobra.Command{
		Use:   "version",
		Short: "Which millrace, Go and kernel this is",
		Long:  "Prints the versions that belong into a bug report.",
	}, readsOnly, func(context.Context, []string) error {
		kernel, err := kernelRelease()
		if err != nil {
			return err
		}
		if s.json() {
			return printJSON(map[string]string{"version": version, "go": runtime.Version(), "kernel": kernel, "arch": runtime.GOARCH})
		}
		fmt.Printf("millrace %s  %s  linux %s  %s\n", version, runtime.Version(), kernel, runtime.GOARCH)
		return nil
	})
}

func kernelRelease() (string, error) {
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return "", fmt.Errorf("read kernel version: %w", err)
	}
	return unix.ByteSliceToString(name.Release[:]), nil
}
