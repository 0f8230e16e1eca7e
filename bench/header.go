package bench

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"
	"unicode"

	"golang.org/x/sys/unix"
)

// newHeader reads the facts of this machine. What cannot be read stays empty: a
// benchmark does not fail for want of a name.
func newHeader(benchmark string, settings map[string]string) Header {
	return Header{
		Benchmark:   benchmark,
		Command:     commandLine(os.Args),
		Time:        time.Now().Truncate(time.Second),
		Machine:     machine(),
		Kernel:      kernelRelease(),
		CPUs:        runtime.NumCPU(),
		LoadAverage: loadAverage(),
		Go:          runtime.Version(),
		Settings:    settings,
	}
}

// commandLine is what a person would type again: quoted for a shell where that
// is needed, the program without its folder.
func commandLine(args []string) string {
	words := append([]string{filepath.Base(args[0])}, args[1:]...)
	for i, word := range words {
		if word == "" || strings.ContainsFunc(word, func(r rune) bool {
			return !unicode.IsLetter(r) && !unicode.IsDigit(r) && !strings.ContainsRune("-_=.,:/%+@", r)
		}) {
			words[i] = "'" + strings.ReplaceAll(word, "'", `'\''`) + "'"
		}
	}
	return strings.Join(words, " ")
}

// machine is the processor's model and the memory, "AMD EPYC, 8.0 GiB".
func machine() string {
	model := runtime.GOARCH
	if data, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(data)) {
			if key, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(key) == "model name" {
				model = strings.TrimSpace(value)
				break
			}
		}
	}
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return model
	}
	return fmt.Sprintf("%s, %.1f GiB", model, float64(info.Totalram)*float64(info.Unit)/(1<<30))
}

func kernelRelease() string {
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return ""
	}
	return unix.ByteSliceToString(name.Release[:])
}

// loadAverage is that of 1, 5 and 15 minutes (proc_loadavg(5)).
func loadAverage() (load [3]float64) {
	data, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return load
	}
	for i, field := range strings.Fields(string(data))[:3] {
		load[i], _ = strconv.ParseFloat(field, 64)
	}
	return load
}
