package millrace_test

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
)

// The rules of docs/decisions/0001-layout.md, which no compiler keeps.

const (
	module          = "github.com/millrace/millrace/"
	linesOfFile     = 900
	linesOfFunction = 110
	documentedShare = 0.98
	objectName      = 15 // BPF_OBJ_NAME_LEN of linux/bpf.h, less the final zero
)

// waivers are exceptions: "rule file or file:name" to the reason. One that is
// not needed any more fails.
var waivers = map[string]string{}

// clause is one line of the import law.
type clause struct {
	from         string
	own, foreign []string
}

// law says what the packages at and below a folder may import: which of our own
// folders, and which modules of others beside the standard library. A folder
// that ends in "/..." stands for all below it as well. The first line that
// fits counts; a package always may import what is below it.
var law = []clause{
	{"model/...", nil, nil},
	{"kernel/probe", []string{"kernel/..."}, []string{"golang.org/x/net/dns/dnsmessage", "golang.org/x/sys"}},
	{"kernel/...", []string{"kernel/..."}, []string{"github.com/cilium/ebpf", "github.com/vishvananda/netlink", "github.com/safchain/ethtool", "golang.org/x/sys"}},
	{"layer", []string{"model", "kernel/..."}, nil},
	{"layer/layertest", []string{"layer", "model", "kernel/..."}, []string{"github.com/cilium/ebpf", "github.com/vishvananda/netlink", "golang.org/x/sys"}},
	{"layer/pod/pool", nil, nil},
	{"layer/pod/cni", []string{"layer/pod/pool"}, []string{"github.com/containernetworking/cni", "golang.org/x/sys"}},
	{"layer/pod", []string{"layer", "model", "kernel/..."}, []string{"github.com/containernetworking/cni", "github.com/cilium/ebpf", "github.com/vishvananda/netlink", "golang.org/x/sys"}},
	{"layer/...", []string{"layer", "model", "kernel/..."}, []string{"github.com/cilium/ebpf", "github.com/vishvananda/netlink", "golang.org/x/sys"}},
	{"source/...", []string{"source/...", "model"}, []string{"k8s.io", "sigs.k8s.io", "go.yaml.in/yaml/v3", "github.com/coredns/caddy/caddyfile", "golang.org/x/sys", "golang.org/x/sync"}},
	{"agent/resolver", []string{"model"}, []string{"github.com/miekg/dns"}},
	{"agent/...", []string{"layer", "model", "kernel/..."}, []string{"github.com/prometheus/client_golang", "golang.org/x/sys", "golang.org/x/sync"}},
	{"page", nil, nil},
	{"doctor/...", []string{"doctor", "page", "layer", "model", "kernel/..."}, []string{"golang.org/x/sys", "golang.org/x/sync"}},
	{"bench/...", []string{"model", "page", "kernel/..."}, []string{"github.com/vishvananda/netlink", "golang.org/x/sys", "golang.org/x/sync"}},
	{"lab/fault", []string{"kernel/..."}, []string{"github.com/cilium/ebpf", "github.com/vishvananda/netlink", "golang.org/x/sys"}},
	{"lab/...", []string{"model", "kernel/..."}, []string{"github.com/vishvananda/netlink", "golang.org/x/sys", "golang.org/x/sync"}},
	{"examples/...", nil, nil},
	{"cmd/...", []string{"agent/...", "doctor/...", "bench/...", "lab/...", "layer/...", "source/...", "model", "kernel/...", "examples"}, []string{"github.com/spf13/cobra", "golang.org/x/sys", "golang.org/x/sync"}},
	// What flannel's own main is made of.
	{"test/cluster/flannel", nil, []string{"github.com/flannel-io/flannel", "github.com/coreos", "github.com/joho/godotenv", "k8s.io/klog"}},
	{"test/...", nil, []string{"golang.org/x/sys"}},
	{"deploy/monitoring", nil, nil},
	{"deploy/image", nil, []string{"github.com/google/go-containerregistry"}},
	{".", nil, nil},
}

// tests may import these in addition, whatever their folder: the first is what
// every layer is tested with, the others are the other end of what is tested.
var testsMayImport = map[string][]string{
	"layer/...":  {module + "layer/layertest", module + "test/docs", "golang.org/x/tools/txtar", "golang.org/x/net/dns/dnsmessage"},
	"doctor/...": {module + "test/docs", module + "test/metrics", module + "test/page", module + "source/dir"},
	"bench/...":  {module + "test/page"},
	"lab/...":    {"google.golang.org/grpc", module + "test/docs"},
	"source/...": {module + "test/docs", "golang.org/x/tools/txtar"},
	"cmd/...":    {module + "layer/layertest", module + "test/metrics", "github.com/spf13/pflag", "github.com/cilium/ebpf"},
	".":          {"github.com/cilium/ebpf"},
	// CoreDNS is asked by its own library.
	"test/cluster": {"github.com/miekg/dns"},
	// Prometheus' own reading and evaluation of rules.
	"deploy/monitoring": {"github.com/prometheus", "go.yaml.in/yaml/v3"},
}

// file is one parsed file of ours.
type file struct {
	path      string // from the module's root: "kernel/netns/netns.go"
	lines     int
	test      bool
	generated bool
	syntax    *ast.File
	positions *token.FileSet
}

func (f *file) folder() string { return path.Dir(f.path) }

func (f *file) imports() (paths []string) {
	for _, spec := range f.syntax.Imports {
		name, _ := strconv.Unquote(spec.Path.Value)
		paths = append(paths, name)
	}
	return paths
}

// at is where a node is, for messages: "kernel/netns/netns.go:12".
func (f *file) at(node ast.Node) string {
	return fmt.Sprintf("%s:%d", f.path, f.positions.Position(node.Pos()).Line)
}

// texts calls f with every file that belongs to the project.
func texts(t *testing.T, f func(name string, content []byte)) {
	t.Helper()
	err := filepath.WalkDir(".", func(name string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if entry.IsDir() {
			if strings.HasPrefix(name, ".") && name != "." && name != ".ci" || name == "bin" || name == "dist" {
				return filepath.SkipDir
			}
			return nil
		}
		if !entry.Type().IsRegular() {
			return nil
		}
		content, err := os.ReadFile(name)
		if err == nil {
			f(filepath.ToSlash(name), content)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

func goFiles(t *testing.T) (files []*file) {
	t.Helper()
	positions := token.NewFileSet()
	texts(t, func(name string, content []byte) {
		if !strings.HasSuffix(name, ".go") || strings.Contains(name, "testdata/") {
			return
		}
		syntax, err := parser.ParseFile(positions, name, content, parser.ParseComments)
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, &file{
			path: name, syntax: syntax, positions: positions,
			lines:     strings.Count(string(content), "\n"),
			test:      strings.HasSuffix(name, "_test.go"),
			generated: ast.IsGenerated(syntax),
		})
	})
	if len(files) < 20 {
		t.Fatalf("only %d files found: the test is blind", len(files))
	}
	return files
}

// below says whether a folder or import path is meant by a pattern of the law.
func below(name, pattern string) bool {
	root, all := strings.CutSuffix(pattern, "/...")
	return name == root || all && strings.HasPrefix(name, root+"/")
}

func allowed(from, imported string, test bool) bool {
	first, _, _ := strings.Cut(imported, "/")
	if !strings.Contains(first, ".") {
		return true // the standard library
	}
	if test {
		for folder, extra := range testsMayImport {
			if below(from, folder) && slices.ContainsFunc(extra, func(e string) bool { return below(imported, e+"/...") }) {
				return true
			}
		}
	}
	i := slices.IndexFunc(law, func(c clause) bool { return below(from, c.from) })
	if i < 0 {
		return false
	}
	if own, ok := strings.CutPrefix(imported+"/", module); ok {
		own = strings.TrimSuffix(own, "/")
		mayImport := func(pattern string) bool { return below(own, pattern) && own != "layer/layertest" }
		return below(own, from+"/...") || slices.ContainsFunc(law[i].own, mayImport)
	}
	return slices.ContainsFunc(law[i].foreign, func(m string) bool { return below(imported, m+"/...") })
}

func TestImportLaw(t *testing.T) {
	for _, f := range goFiles(t) {
		for _, imported := range f.imports() {
			if !allowed(f.folder(), imported, f.test) {
				t.Errorf("%s imports %s, which the import law does not allow: see docs/decisions/0001-layout.md", f.path, imported)
			}
		}
	}
}

// The law is code, so it is tested: without this a typing error in a pattern
// would allow everything.
func TestImportLawForbids(t *testing.T) {
	for _, row := range []struct {
		from, imported string
		test, want     bool
	}{
		{"model", "net/netip", false, true},
		{"model", "golang.org/x/sys/unix", false, false},
		{"kernel/link", module + "kernel/netns", false, true},
		{"kernel/link", module + "model", false, false},
		{"layer/service", module + "layer", false, true},
		{"layer/service", module + "layer/route", false, false},
		{"layer/service", module + "layer/layertest", true, true},
		{"layer/service", module + "layer/layertest", false, false},
		{"layer/service", module + "source/dir", true, false},
		{"layer/service", "k8s.io/api/core/v1", false, false},
		{"source/dir", "k8s.io/api/core/v1", false, true},
		{"source/dir", module + "layer", false, false},
		{"agent", module + "layer/service", false, false},
		{"doctor/report", module + "doctor", false, true},
		{"doctor", module + "layer/service", false, false},
		{"lab", module + "layer", false, false},
		{"lab", "google.golang.org/grpc/health/grpc_health_v1", true, true},
		{"lab", "google.golang.org/grpc", false, false},
		{"cmd/millrace", module + "layer/service", false, true},
		{"cmd/millrace", module + "layer/layertest", false, false},
		{"cmd/millrace", "k8s.io/api/core/v1", false, false},
		{"unheard/of", module + "model", false, false},
	} {
		if got := allowed(row.from, row.imported, row.test); got != row.want {
			t.Errorf("%s imports %s (test: %v): allowed is %v", row.from, row.imported, row.test, got)
		}
	}
}

// No folder imports, over any number of others, a folder that imports it: also
// not through their tests, where the compiler allows it, and also not between
// the folders at the root. Which folders know each other says more about a code
// base than the length of its functions.
func TestFoldersDoNotImportEachOther(t *testing.T) {
	packages, roots := map[string]map[string]bool{}, map[string]map[string]bool{}
	add := func(graph map[string]map[string]bool, from, to string) {
		if from != to {
			if graph[from] == nil {
				graph[from] = map[string]bool{}
			}
			graph[from][to] = true
		}
	}
	for _, f := range goFiles(t) {
		for _, imported := range f.imports() {
			own, ok := strings.CutPrefix(imported, module)
			if !ok {
				continue
			}
			add(packages, f.folder(), own)
			from, _, _ := strings.Cut(f.folder(), "/")
			to, _, _ := strings.Cut(own, "/")
			add(roots, from, to)
		}
	}
	for _, graph := range []map[string]map[string]bool{packages, roots} {
		for _, from := range slices.Sorted(maps.Keys(graph)) {
			for _, to := range slices.Sorted(maps.Keys(graph[from])) {
				if leads(graph, to, from, map[string]bool{}) {
					t.Errorf("%s imports %s, which leads back to it", from, to)
				}
			}
		}
	}
}

// leads says whether a way in the graph goes from one folder to another.
func leads(graph map[string]map[string]bool, from, to string, seen map[string]bool) bool {
	if from == to {
		return true
	}
	if seen[from] {
		return false
	}
	seen[from] = true
	for next := range graph[from] {
		if leads(graph, next, to, seen) {
			return true
		}
	}
	return false
}

var forbiddenNames = []string{"base", "common", "helper", "helpers", "manager", "misc", "types", "util", "utils"}

func TestPackagesAreNamedForAThing(t *testing.T) {
	for _, f := range goFiles(t) {
		for _, name := range append(strings.Split(f.folder(), "/"), f.syntax.Name.Name) {
			if slices.Contains(forbiddenNames, name) {
				t.Errorf("%s: %q does not say what the package is about", f.path, name)
			}
		}
	}
}

func TestEveryPackageIsDocumented(t *testing.T) {
	documented := map[string]bool{}
	for _, f := range goFiles(t) {
		if f.test {
			continue
		}
		documented[f.folder()] = documented[f.folder()] || f.syntax.Doc != nil && len(f.syntax.Doc.Text()) > 40
	}
	for _, folder := range slices.Sorted(maps.Keys(documented)) {
		if !documented[folder] {
			t.Errorf("package %s has no comment that says what it is for and what it costs", folder)
		}
	}
}

func TestExportedNamesAreDocumented(t *testing.T) {
	var all int
	var bare []string
	for _, f := range goFiles(t) {
		if f.test || f.generated {
			continue
		}
		for _, declaration := range f.syntax.Decls {
			exported, undocumented := names(f, declaration)
			all += exported
			bare = append(bare, undocumented...)
		}
	}
	if share := 1 - float64(len(bare))/float64(all); share < documentedShare {
		t.Errorf("%.1f %% of %d exported names are documented, not %.0f %%. Without a comment:\n%s",
			100*share, all, 100*documentedShare, strings.Join(bare, "\n"))
	}
}

// names counts the exported names of a declaration and lists those without a
// comment. The comment of a group stands for all in it, as in `go doc`.
func names(f *file, declaration ast.Decl) (exported int, bare []string) {
	note := func(name *ast.Ident, documented bool) {
		if !name.IsExported() {
			return
		}
		exported++
		if !documented {
			bare = append(bare, f.at(name)+" "+name.Name)
		}
	}
	switch d := declaration.(type) {
	case *ast.FuncDecl:
		if d.Recv == nil || ast.IsExported(receiver(d)) {
			note(d.Name, d.Doc != nil)
		}
	case *ast.GenDecl:
		for _, spec := range d.Specs {
			switch s := spec.(type) {
			case *ast.TypeSpec:
				note(s.Name, s.Doc != nil || d.Doc != nil)
			case *ast.ValueSpec:
				for _, name := range s.Names {
					note(name, s.Doc != nil || s.Comment != nil || d.Doc != nil)
				}
			}
		}
	}
	return exported, bare
}

// receiver is the name of the type that a method belongs to.
func receiver(d *ast.FuncDecl) string {
	expression := d.Recv.List[0].Type
	for {
		switch e := expression.(type) {
		case *ast.StarExpr:
			expression = e.X
		case *ast.IndexExpr:
			expression = e.X
		case *ast.IndexListExpr:
			expression = e.X
		case *ast.Ident:
			return e.Name
		default:
			return ""
		}
	}
}

func TestNothingIsLongerThanAScreenOrTwo(t *testing.T) {
	used := map[string]bool{}
	complain := func(key, format string, values ...any) {
		if _, waived := waivers[key]; waived {
			used[key] = true
			return
		}
		t.Errorf(format+": cut it, or add a waiver %q with a reason", append(values, key)...)
	}
	for _, f := range goFiles(t) {
		if f.generated {
			continue
		}
		if f.lines > linesOfFile {
			complain("long "+f.path, "%s has %d lines, more than %d", f.path, f.lines, linesOfFile)
		}
		for _, declaration := range f.syntax.Decls {
			d, ok := declaration.(*ast.FuncDecl)
			if !ok {
				continue
			}
			lines := f.positions.Position(d.End()).Line - f.positions.Position(d.Pos()).Line + 1
			if lines > linesOfFunction {
				complain("long "+f.path+":"+d.Name.Name, "%s: %s has %d lines, more than %d", f.at(d), d.Name.Name, lines, linesOfFunction)
			}
		}
	}
	for key, reason := range waivers {
		if !used[key] || reason == "" {
			t.Errorf("waiver %q is not needed any more, or has no reason", key)
		}
	}
}

// What runs because a package is imported cannot be left out by not calling it.
func TestNoInitFunctions(t *testing.T) {
	for _, f := range goFiles(t) {
		for _, declaration := range f.syntax.Decls {
			d, ok := declaration.(*ast.FuncDecl)
			if ok && d.Recv == nil && d.Name.Name == "init" && !f.generated {
				t.Errorf("%s: func init: call it from main, where a reader sees it", f.at(d))
			}
		}
	}
}

func TestErrorsNameTheActNotTheFailure(t *testing.T) {
	for _, f := range goFiles(t) {
		if f.test {
			continue
		}
		ast.Inspect(f.syntax, func(node ast.Node) bool {
			literal, ok := node.(*ast.BasicLit)
			if ok && literal.Kind == token.STRING && strings.Contains(literal.Value, "failed to ") {
				t.Errorf("%s: %s: say the act, the object and the cause", f.at(literal), literal.Value)
			}
			return true
		})
	}
}

// Folders of a developer's machine have no place in the tree.
var machinePath = regexp.MustCompile(`(^|[^\w.])/` + `(work|home/[a-z]+)/`)

func TestNoPathsOfOneMachine(t *testing.T) {
	texts(t, func(name string, content []byte) {
		if found := machinePath.Find(content); found != nil {
			t.Errorf("%s holds %q, a path of somebody's machine", name, found)
		}
	})
}

// A feature is a program, a setting or a layer. Code behind an #if is compiled
// by one reader in two.
var condition = regexp.MustCompile(`(?m)^\s*#\s*(if|ifdef|ifndef|elif)\b.*`)

func TestNoConditionsInC(t *testing.T) {
	found := 0
	texts(t, func(name string, content []byte) {
		if extension := path.Ext(name); extension != ".c" && extension != ".h" {
			return
		}
		found++
		if line := condition.Find(content); line != nil {
			t.Errorf("%s holds %q: make it a setting in .rodata, which the verifier removes", name, line)
		}
	})
	if found == 0 {
		t.Fatal("no C file found: the test is blind")
	}
}

// A longer name is cut by the kernel, and then is another word in bpftool than
// it is here.
func TestNamesOfObjectsFitTheKernel(t *testing.T) {
	found := 0
	texts(t, func(name string, content []byte) {
		if !strings.HasSuffix(name, "_bpfel.o") {
			return
		}
		found++
		spec, err := ebpf.LoadCollectionSpec(name)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		for _, object := range append(slices.Sorted(maps.Keys(spec.Maps)), slices.Sorted(maps.Keys(spec.Programs))...) {
			if len(object) > objectName {
				t.Errorf("%s: %q has more than %d characters", name, object, objectName)
			}
		}
	})
	if found == 0 {
		t.Fatal("no object found: the test is blind")
	}
}
