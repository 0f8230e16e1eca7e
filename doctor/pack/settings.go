package pack

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
)

// mostOfSetting is how much of one file is read.
const mostOfSetting = 64 << 10

// Settings are those of the network below procSys ("/proc/sys"), as sysctl -a names
// them, without keys. Of the settings of single devices there are those of all and default only.
func Settings(procSys string) Part {
	return Part{"sysctl.txt", procSys + "/net", func(ctx context.Context) ([]byte, error) {
		var out bytes.Buffer
		var unread []error
		err := filepath.WalkDir(filepath.Join(procSys, "net"), func(name string, entry fs.DirEntry, err error) error {
			switch {
			case ctx.Err() != nil:
				return ctx.Err()
			case err != nil:
				return err
			case entry.IsDir() && ofOneDevice(name):
				return fs.SkipDir
			case entry.IsDir() || keys[entry.Name()]:
				return nil
			}
			value, err := readSome(name)
			if err != nil {
				// Some can be written only.
				if !errors.Is(err, fs.ErrPermission) {
					unread = append(unread, err)
				}
				return nil
			}
			key, _ := filepath.Rel(procSys, name)
			for line := range strings.Lines(string(value)) {
				fmt.Fprintf(&out, "%s = %s\n", strings.ReplaceAll(filepath.ToSlash(key), "/", "."), strings.TrimSuffix(line, "\n"))
			}
			return nil
		})
		return out.Bytes(), errors.Join(append(unread, err)...)
	}}
}

// keys are settings that are secrets, of Documentation/networking/ip-sysctl.rst.
var keys = map[string]bool{"tcp_fastopen_key": true, "stable_secret": true}

func ofOneDevice(folder string) bool {
	above, name := path.Base(path.Dir(folder)), path.Base(folder)
	return (above == "conf" || above == "neigh") && name != "all" && name != "default"
}

func readSome(name string) ([]byte, error) {
	file, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	return io.ReadAll(io.LimitReader(file, mostOfSetting))
}

// Files are files of counters, one after the other, each with its name.
func Files(name string, files ...string) Part {
	return Part{name, strings.Join(files, ", "), func(context.Context) ([]byte, error) {
		var out bytes.Buffer
		var unread []error
		for _, file := range files {
			content, err := readSome(file)
			if err != nil {
				unread = append(unread, err)
				continue
			}
			fmt.Fprintf(&out, "== %s\n%s\n", file, content)
		}
		return out.Bytes(), errors.Join(unread...)
	}}
}
