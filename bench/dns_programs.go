package bench

import (
	"context"
	"crypto/sha256"
	_ "embed"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// CoreDNSVersion is the CoreDNS that DNS builds from the Go module proxy.
const CoreDNSVersion = "v1.15.0"

// coreDNSMain is a CoreDNS with what a cache on a node has. Its own main has the interfaces
// to several clouds in it, too, which take minutes to compile.
const coreDNSMain = `package main

import (
	"github.com/coredns/coredns/coremain"
	_ "github.com/coredns/coredns/plugin/bind"
	_ "github.com/coredns/coredns/plugin/cache"
	_ "github.com/coredns/coredns/plugin/forward"
)

func main() { coremain.Run() }
`

// getaddrinfo is a program in C that looks names up by the library that it is linked with.
//
//go:embed getaddrinfo.c
var getaddrinfo string

// programs finds, by variant and operation, the programs that are not ours. What is not to
// be had is left out.
func (s *dnsSession) programs(ctx context.Context) (map[string]string, error) {
	found := map[string]string{}
	folder, err := cacheFolder()
	if err != nil {
		return nil, err
	}
	found[CoreDNS] = s.CoreDNS
	if s.CoreDNS == "" {
		if found[CoreDNS], err = s.buildCoreDNS(ctx, folder); err != nil {
			s.skip(CoreDNS, "%v; or name one: `millrace bench dns PATH`", err)
			found[CoreDNS] = ""
		}
	} else if _, err := os.Stat(s.CoreDNS); err != nil {
		return nil, fmt.Errorf("%w: CoreDNS: %w", ErrOptions, err)
	}
	if found[Unbound], err = exec.LookPath("unbound"); err != nil {
		s.skip(Unbound, "it is not installed: apt-get install unbound")
		found[Unbound] = ""
	}
	for library, compilers := range map[string][]string{Glibc: {"cc", "gcc", "clang"}, Musl: {"musl-gcc"}} {
		if found[library], err = compile(ctx, folder, compilers); err != nil {
			s.skip(library, "%v", err)
			found[library] = ""
		}
	}
	if s.CoreDNS != "" || found[CoreDNS] == "" {
		return found, nil
	}
	s.report.Header.Settings[CoreDNS] = CoreDNSVersion + " from the Go module proxy, cache and forward"
	return found, nil
}

// cacheFolder is where programs are kept from one run to the next.
func cacheFolder() (string, error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		cache = filepath.Join("/var/cache")
	}
	folder := filepath.Join(cache, "millrace", "bench")
	if err := os.MkdirAll(folder, 0o755); err != nil {
		return "", fmt.Errorf("make cache folder: %w", err)
	}
	return folder, nil
}

// buildCoreDNS builds it from the Go module proxy, if it is not in the folder yet.
func (s *dnsSession) buildCoreDNS(ctx context.Context, folder string) (string, error) {
	program := filepath.Join(folder, "coredns-"+CoreDNSVersion)
	if _, err := os.Stat(program); err == nil {
		return program, nil
	}
	tool, err := exec.LookPath("go")
	if errors.Is(err, exec.ErrNotFound) {
		return "", errors.New("go is missing, which builds it: https://go.dev/dl")
	} else if err != nil {
		return "", err
	}
	module, err := os.MkdirTemp(folder, "coredns-")
	if err != nil {
		return "", fmt.Errorf("make folder: %w", err)
	}
	defer os.RemoveAll(module)
	files := map[string]string{"main.go": coreDNSMain, "go.mod": "module coredns\n\ngo 1.25\n\nrequire github.com/coredns/coredns " + CoreDNSVersion + "\n"}
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(module, name), []byte(text), 0o644); err != nil {
			return "", fmt.Errorf("write %s: %w", name, err)
		}
	}
	s.progress("build CoreDNS %s from the Go module proxy; a few minutes the first time", CoreDNSVersion)
	for _, args := range [][]string{{"mod", "tidy"}, {"build", "-trimpath", "-o", program + ".part", "."}} {
		c := exec.CommandContext(ctx, tool, args...)
		c.Dir = module
		c.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=-mod=mod", "GOWORK=off")
		if said, err := c.CombinedOutput(); err != nil {
			return "", fmt.Errorf("build CoreDNS %s: go %s: %w: %s", CoreDNSVersion, args[0], err, lastLine(string(said)))
		}
	}
	return program, os.Rename(program+".part", program)
}

func lastLine(text string) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return lines[len(lines)-1]
}

// compile makes the program of getaddrinfo.c with the first compiler that is there.
func compile(ctx context.Context, folder string, compilers []string) (string, error) {
	packages := map[string]string{"cc": "gcc libc6-dev", "musl-gcc": "musl-tools"}
	for _, compiler := range compilers {
		path, err := exec.LookPath(compiler)
		if errors.Is(err, exec.ErrNotFound) {
			continue
		}
		if err != nil {
			return "", err
		}
		program := filepath.Join(folder, fmt.Sprintf("getaddrinfo-%s-%x", compiler, sha256.Sum256([]byte(getaddrinfo)))[:60])
		if _, err := os.Stat(program); !errors.Is(err, fs.ErrNotExist) {
			return program, err
		}
		c := exec.CommandContext(ctx, path, "-O2", "-o", program+".part", "-x", "c", "-")
		c.Stdin = strings.NewReader(getaddrinfo)
		if said, err := c.CombinedOutput(); err != nil {
			return "", fmt.Errorf("compile a program with %s: %w: %s", compiler, err, lastLine(string(said)))
		}
		return program, os.Rename(program+".part", program)
	}
	return "", fmt.Errorf("no %s is there to compile a program with: apt-get install %s", compilers[0], packages[compilers[0]])
}
