// Package need names what this host lacks: a privilege, or a feature of the
// kernel. Errors of these types end a command with an exit status of their own.
//
// It reads /proc/self/status and writes nothing.
package need

import (
	"bufio"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
)

// Privilege says that the process may not do what it was asked to.
type Privilege struct {
	// Act is what was asked: "load eBPF programs".
	Act string
	// Capabilities are what it takes, as capabilities(7) names them.
	Capabilities []string
}

// Error says what is missing and what to do.
func (p *Privilege) Error() string {
	return fmt.Sprintf("%s: this process lacks %s: run it as root, or give it these capabilities", p.Act, strings.Join(p.Capabilities, ", "))
}

// Feature says that the running kernel cannot do something.
type Feature struct {
	// Act is what was asked for, Feature what is missing.
	Act, Feature string
	// Since is the first kernel that has it, or the option to build with.
	Since string
}

// Error says what is missing and what to do.
func (f *Feature) Error() string {
	return fmt.Sprintf("%s: this kernel has no %s: it needs %s", f.Act, f.Feature, f.Since)
}

// capability numbers of capabilities(7), linux/capability.h.
var numbers = map[string]uint{
	"CAP_NET_ADMIN":  12,
	"CAP_SYS_PTRACE": 19,
	"CAP_SYS_ADMIN":  21,
	"CAP_PERFMON":    38,
	"CAP_BPF":        39,
}

// Check returns a *Privilege if this process lacks any of the capabilities in
// its effective set. CAP_SYS_ADMIN stands for CAP_BPF and CAP_PERFMON.
func Check(act string, capabilities ...string) error {
	effective, err := effective()
	if err != nil {
		return err
	}
	has := func(name string) bool { return effective&(1<<numbers[name]) != 0 }
	var missing []string
	for _, name := range capabilities {
		covered := has("CAP_SYS_ADMIN") && (name == "CAP_BPF" || name == "CAP_PERFMON")
		if !has(name) && !covered {
			missing = append(missing, name)
		}
	}
	if len(missing) > 0 {
		return &Privilege{Act: act, Capabilities: missing}
	}
	return nil
}

func effective() (uint64, error) {
	// The file is of this thread, and empty once that has ended: the goroutine has to stay.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	file, err := os.Open("/proc/thread-self/status")
	if err != nil {
		return 0, fmt.Errorf("read capabilities: %w", err)
	}
	defer file.Close()
	lines := bufio.NewScanner(file)
	for lines.Scan() {
		if value, ok := strings.CutPrefix(lines.Text(), "CapEff:"); ok {
			return strconv.ParseUint(strings.TrimSpace(value), 16, 64)
		}
	}
	return 0, fmt.Errorf("read capabilities: no CapEff in /proc/thread-self/status")
}
