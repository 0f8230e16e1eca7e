// Command init is the first and only process that the virtual machine of
// test/kernel starts: it makes the machine as a container host looks, with
// cgroup2 as the only hierarchy, runs the test binaries it finds in /tests, and other
// programs in /commands, one after the other, says on the console how each ended, and
// switches off.
//
// It is for that machine only: on any other it refuses to do anything.
package main

import (
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// The words on the console that kernel_test.go waits for.
const (
	begin = "@@ begin"
	end   = "@@ end"
	done  = "@@ done"
)

func main() {
	if os.Getpid() != 1 {
		fmt.Fprintln(os.Stderr, "init: this is the first process of a virtual machine of test/kernel, and nothing else")
		os.Exit(2)
	}
	if err := run(); err != nil {
		fmt.Println("init:", err)
	} else {
		fmt.Println(done)
	}
	unix.Sync()
	time.Sleep(100 * time.Millisecond) // the serial line is slower than the power switch
	err := unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	fmt.Println("init: switch off:", err)
}

func run() error {
	if err := furnish(); err != nil {
		return err
	}
	if err := loadModules("/modules"); err != nil {
		return err
	}
	if err := loopbackUp(); err != nil {
		return err
	}
	return filepath.WalkDir("/", func(path string, entry fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case path == "/proc" || path == "/sys" || path == "/dev":
			return fs.SkipDir
		case entry.Name() == "package.test":
			test(path)
		case entry.Name() == "program":
			command(path)
		}
		return nil
	})
}

// furnish mounts what a host has.
func furnish() error {
	for _, m := range []struct{ what, where string }{
		{"devtmpfs", "/dev"}, {"proc", "/proc"}, {"sysfs", "/sys"},
		{"cgroup2", "/sys/fs/cgroup"}, {"bpf", "/sys/fs/bpf"},
		{"tmpfs", "/tmp"}, {"tmpfs", "/run"},
	} {
		if err := os.MkdirAll(m.where, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m.what, m.where, m.what, 0, ""); err != nil {
			return fmt.Errorf("mount %s on %s: %w", m.what, m.where, err)
		}
	}
	os.Setenv("PATH", "/bin")
	os.Setenv("HOME", "/tmp")
	return nil
}

// loadModules loads what is in the folder, in the order of the files' names.
func loadModules(folder string) error {
	files, err := os.ReadDir(folder)
	if err != nil {
		return err
	}
	for _, entry := range files {
		file, err := os.Open(filepath.Join(folder, entry.Name()))
		if err != nil {
			return err
		}
		flags := 0
		if !strings.HasSuffix(entry.Name(), ".ko") {
			flags = unix.MODULE_INIT_COMPRESSED_FILE
		}
		err = unix.FinitModule(int(file.Fd()), "", flags)
		file.Close()
		if err != nil {
			return fmt.Errorf("load module %s: %w", entry.Name(), err)
		}
	}
	return nil
}

func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	request, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	request.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, request); err != nil {
		return fmt.Errorf("bring lo up: %w", err)
	}
	return nil
}

// test runs one test binary in its package's folder, as `go test` does.
func test(binary string) {
	start(binary, strings.TrimPrefix(filepath.Dir(binary), "/tests/"), "-test.v", "-test.timeout=10m")
}

// command runs another program.
func command(binary string) { start(binary, filepath.Base(filepath.Dir(binary))) }

// start runs a program in its folder with the arguments given and those of its folder.
func start(binary, name string, arguments ...string) {
	folder := filepath.Dir(binary)
	fmt.Println(begin, name)
	// One flag a line; a test without any has an empty file.
	flags, err := os.ReadFile(filepath.Join(folder, "flags"))
	if err != nil {
		fmt.Println(end, name, err)
		return
	}
	command := exec.Command(binary, append(arguments, strings.Fields(string(flags))...)...)
	command.Dir, command.Stdout, command.Stderr = folder, os.Stdout, os.Stdout
	command.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	status := "passed"
	if err := command.Run(); err != nil {
		status = err.Error()
	}
	fmt.Println(end, name, status)
}
