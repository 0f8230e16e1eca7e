// Package symbol names functions of the running kernel by addresses in them.
//
// It reads /proc/kallsyms once for each call and keeps nothing of it: 120,000 lines
// take some 150 ms. It writes nothing. Without CAP_SYSLOG the kernel hides its
// addresses (kernel.kptr_restrict).
package symbol

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"os"
	"slices"
	"strings"
)

// ErrHidden says that the kernel shows no addresses to this process.
var ErrHidden = errors.New("the kernel hides the addresses of its functions: CAP_SYSLOG is missing, or kernel.kptr_restrict is 2")

// Names tells the functions that addresses are in, without what the compiler adds
// when it cuts a function up ("nf_hook_slow.part.0"). An address of no function is
// left out.
func Names(addresses []uint64) (map[uint64]string, error) {
	if len(addresses) == 0 {
		return map[uint64]string{}, nil
	}
	file, err := os.Open("/proc/kallsyms")
	if err != nil {
		return nil, fmt.Errorf("name functions of the kernel: %w", err)
	}
	defer file.Close()
	names, err := read(file, addresses)
	if err != nil {
		return nil, fmt.Errorf("name functions of the kernel: %w", err)
	}
	return names, nil
}

// read finds for each address the last symbol that is not behind it. The list is not
// in order: modules follow the kernel, wherever they lie.
func read(from io.Reader, addresses []uint64) (map[uint64]string, error) {
	asked := slices.Clone(addresses)
	slices.Sort(asked)
	asked = slices.Compact(asked)
	type symbol struct {
		address uint64
		name    string
	}
	nearest := make([]symbol, len(asked))
	shown := false
	lines := bufio.NewScanner(from)
	lines.Buffer(nil, 1<<16)
	for lines.Scan() {
		address, kind, name := parse(lines.Bytes())
		if address == 0 {
			continue
		}
		shown = true
		if kind != 't' && kind != 'T' && kind != 'w' && kind != 'W' {
			continue
		}
		at, _ := slices.BinarySearch(asked, address)
		if at < len(asked) && nearest[at].address <= address {
			nearest[at] = symbol{address, string(name)}
		}
	}
	if err := lines.Err(); err != nil {
		return nil, err
	}
	if !shown {
		return nil, ErrHidden
	}
	names := map[uint64]string{}
	for i, address := range asked {
		if i > 0 && nearest[i-1].address > nearest[i].address {
			nearest[i] = nearest[i-1]
		}
		if name, _, _ := strings.Cut(nearest[i].name, "."); name != "" {
			names[address] = name
		}
	}
	return names, nil
}

// parse reads "ffffffff81000000 T name	[module]".
func parse(line []byte) (address uint64, kind byte, name []byte) {
	first, rest, found := bytes.Cut(line, []byte{' '})
	if !found || len(rest) < 3 || len(first) > bits.UintSize/4 {
		return 0, 0, nil
	}
	for _, digit := range first {
		switch {
		case digit >= '0' && digit <= '9':
			digit -= '0'
		case digit >= 'a' && digit <= 'f':
			digit -= 'a' - 10
		default:
			return 0, 0, nil
		}
		address = address<<4 | uint64(digit)
	}
	name, _, _ = bytes.Cut(rest[2:], []byte{'\t'})
	return address, rest[0], name
}
