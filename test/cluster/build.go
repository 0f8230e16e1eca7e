package main

import (
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
)

// The versions of everything are in go.mod, and nowhere else.
var (
	//go:embed go.mod
	goMod string
	//go:embed go.sum
	goSum string
)

// Folders, from the root of the repository.
const (
	moduleFolder = "test/cluster"
	cacheFolder  = ".cache/cluster"
)

type tool struct{ name, path string }

// clusterTools are the binaries that the cluster is made of: name and package.
var clusterTools = []tool{
	{"etcd", "go.etcd.io/etcd/server/v3"},
	{"kubectl", "k8s.io/kubernetes/cmd/kubectl"},
	{"kube-apiserver", "k8s.io/kubernetes/cmd/kube-apiserver"},
	{"kube-controller-manager", "k8s.io/kubernetes/cmd/kube-controller-manager"},
	{"kube-scheduler", "k8s.io/kubernetes/cmd/kube-scheduler"},
	{"kubelet", "k8s.io/kubernetes/cmd/kubelet"},
	{"kube-proxy", "k8s.io/kubernetes/cmd/kube-proxy"},
	{"agnhost", "k8s.io/kubernetes/test/images/agnhost"},
	{"regression-issue-74839", "k8s.io/kubernetes/test/images/regression-issue-74839"},
	{"pause", "./pause"},
	{"calls", "./calls"},
	{"coredns", ""}, // see writeCoreDNS
}

// testTools are those that tests are put to it with. A binary that ends in .test
// is the test of its package.
var testTools = []tool{
	{"ginkgo", "github.com/onsi/ginkgo/v2/ginkgo"},
	{"e2e.test", "k8s.io/kubernetes/test/e2e"},
}

// toolsOf are those of clusterTools with these names.
func toolsOf(names []string) []tool {
	return slices.DeleteFunc(slices.Clone(clusterTools), func(t tool) bool { return !slices.Contains(names, t.name) })
}

// version of a module, as go.mod requires it: v1.36.3.
func version(module string) string {
	line := regexp.MustCompile(`(?m)^(?:require|)\s*` + regexp.QuoteMeta(module) + ` (v\S+)`).FindStringSubmatch(goMod)
	if line == nil {
		panic("go.mod requires no " + module)
	}
	return line[1]
}

// linkFlags make the binaries say the version that they are of.
func linkFlags() string {
	full := version("k8s.io/kubernetes")
	parts := strings.SplitN(strings.TrimPrefix(full, "v"), ".", 3)
	flags := []string{"-s", "-w"}
	for _, of := range []string{"k8s.io/component-base/version", "k8s.io/client-go/pkg/version"} {
		for _, variable := range [][2]string{{"gitVersion", full}, {"gitMajor", parts[0]}, {"gitMinor", parts[1]}, {"gitTreeState", "clean"}} {
			flags = append(flags, "-X", of+"."+variable[0]+"="+variable[1])
		}
	}
	return strings.Join(flags, " ")
}

// binaries is the folder for binaries of these versions, made by this Go.
func binaries() (string, error) {
	key := sha256.New()
	for _, part := range []string{goMod, goSum, runtime.Version(), runtime.GOARCH, linkFlags()} {
		fmt.Fprintf(key, "%d %s", len(part), part)
	}
	return filepath.Abs(filepath.Join(cacheFolder, "bin", hex.EncodeToString(key.Sum(nil))[:12]))
}

// build makes what is not there yet, one binary after the other, and returns the
// folder of all. Binaries of other versions are removed.
func build(ctx context.Context, tools []tool) (string, error) {
	if _, err := os.Stat(filepath.Join(moduleFolder, "go.mod")); err != nil {
		return "", fmt.Errorf("run from the root of the repository: %w", err)
	}
	folder, err := binaries()
	if err != nil {
		return "", err
	}
	if err := removeOthers(folder); err != nil {
		return "", err
	}
	for _, tool := range tools {
		file := filepath.Join(folder, tool.name)
		if _, err := os.Stat(file); err == nil && !strings.HasPrefix(tool.path, "./") { // our own may be others now
			continue
		}
		say("build %s", tool.name)
		if err := buildTool(ctx, tool.path, file); err != nil {
			return "", fmt.Errorf("build %s: %w", tool.name, err)
		}
	}
	return folder, copyImageFiles(ctx, folder)
}

func removeOthers(folder string) error {
	entries, err := os.ReadDir(filepath.Dir(folder))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, entry := range entries {
		if entry.Name() != filepath.Base(folder) {
			if err := os.RemoveAll(filepath.Join(filepath.Dir(folder), entry.Name())); err != nil {
				return err
			}
		}
	}
	return os.MkdirAll(folder, 0o755)
}

// buildTool writes beside the file first, so that a build that was interrupted
// leaves nothing that looks finished.
func buildTool(ctx context.Context, path, file string) error {
	if path == "" {
		var err error
		if path, err = writeCoreDNS(filepath.Dir(file)); err != nil {
			return err
		}
	}
	arguments := []string{"build"}
	if strings.HasSuffix(file, ".test") {
		// Or it would vet all of Kubernetes.
		arguments = []string{"test", "-c", "-vet=off"}
	}
	arguments = append(arguments, "-ldflags", linkFlags(), "-o", file+".part", path)
	if _, err := goTool(ctx, arguments...); err != nil {
		return err
	}
	return os.Rename(file+".part", file)
}

func goTool(ctx context.Context, arguments ...string) (string, error) {
	command := exec.CommandContext(ctx, "go", arguments...)
	command.Dir = moduleFolder
	command.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=-trimpath -buildvcs=false "+os.Getenv("GOFLAGS"))
	var output, said strings.Builder // apart: it says what it downloads, too
	command.Stdout, command.Stderr = &output, &said
	if err := command.Run(); err != nil {
		return "", fmt.Errorf("%w:\n%s", err, lastLines(said.String(), 20))
	}
	return output.String(), nil
}

// writeCoreDNS writes a CoreDNS with the plugins that go.mod names as tools. Its
// own main has all of them in, among them the interfaces to several clouds, which
// take minutes to compile.
func writeCoreDNS(folder string) (string, error) {
	const module = "github.com/coredns/coredns/"
	var text strings.Builder
	text.WriteString("package main\n\nimport (\n\t\"" + module + "coremain\"\n")
	for _, match := range regexp.MustCompile(`(?m)^\s+(`+module+`plugin/\S+)$`).FindAllStringSubmatch(goMod, -1) {
		fmt.Fprintf(&text, "\t_ %q\n", match[1])
	}
	text.WriteString(")\n\nfunc main() { coremain.Run() }\n")
	file := filepath.Join(folder, "coredns.go")
	return file, os.WriteFile(file, []byte(text.String()), 0o644)
}

// copyImageFiles brings what belongs to the image of agnhost and is no binary.
func copyImageFiles(ctx context.Context, folder string) error {
	files := map[string]string{"agnhost.version": "VERSION", "localhost.crt": "porter/localhost.crt", "localhost.key": "porter/localhost.key"}
	source := ""
	for name, path := range files {
		if _, err := os.Stat(filepath.Join(folder, name)); err == nil {
			continue
		}
		if source == "" {
			output, err := goTool(ctx, "list", "-f", "{{.Dir}}", "k8s.io/kubernetes/test/images/agnhost")
			if err != nil {
				return fmt.Errorf("find the source of agnhost: %w", err)
			}
			source = strings.TrimSpace(output)
		}
		content, err := os.ReadFile(filepath.Join(source, path))
		if err == nil {
			err = os.WriteFile(filepath.Join(folder, name), content, 0o644)
		}
		if err != nil {
			return fmt.Errorf("copy a file of agnhost's image: %w", err)
		}
	}
	return nil
}
