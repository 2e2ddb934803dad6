"""Every text of the page in English and Chinese: one table."""

from __future__ import annotations

from typing import Final

STRINGS: Final[dict[str, tuple[str, str]]] = {
    # what is always there
    "lead": (
        "# sdopt\nTurn a diffusion model into fast inference artifacts.",
        "# sdopt\n把扩散模型转换为高速推理产物。",
    ),
    "bundle": ("Model", "模型"),
    "bundle_info": ("A bundle under the root of this server", "服务器根目录下的模型包（bundle）"),
    "refresh": ("Refresh", "刷新"),
    # step 1
    "source_tab": ("1 Source", "1 来源"),
    "from_root": ("On the server", "服务器"),
    "from_upload": ("Upload", "上传"),
    "from_url": ("URL", "网址"),
    "source": ("Checkpoint", "模型权重"),
    "source_info": (
        "A .safetensors file or a diffusers folder under the root",
        "根目录下的 .safetensors 文件或 diffusers 文件夹",
    ),
    "upload": ("A .safetensors file", "一个 .safetensors 文件"),
    "url": ("URL", "网址"),
    "url_info": (
        "http or https; is written to disk while it arrives",
        "http 或 https；边下载边写盘",
    ),
    "sha256": ("SHA-256", "SHA-256 校验值"),
    "optional": ("Optional", "可选"),
    "limit": ("At most, in GB", "大小上限（GB）"),
    "fetch": ("Download", "下载"),
    "name": ("Name of the model", "模型名称"),
    "name_info": (
        "A folder of this name is made under the root; letters, digits, dots, dashes",
        "将在根目录下建立同名文件夹；可用字母、数字、点和短横线",
    ),
    "dtype": ("Precision of the weights", "权重精度"),
    "as_is": ("as the checkpoint has it", "与权重文件相同"),
    "loras": ("LoRAs to merge", "要合并的 LoRA"),
    "scales": ("Their scales", "各自的强度"),
    "scales_info": (
        "One number per LoRA, in the same order, separated by commas; 1 where left out",
        "按顺序每个 LoRA 一个数，用逗号分隔；缺省为 1",
    ),
    "controlnet": ("ControlNet", "ControlNet"),
    "extras": ("LoRAs and ControlNet", "LoRA 与 ControlNet"),
    "vae": ("Another VAE", "替换 VAE"),
    "text_encoder": ("Another text encoder", "替换文本编码器"),
    "text_encoder_2": ("Another second text encoder", "替换第二文本编码器"),
    "tokenizer": ("Another tokenizer", "替换分词器"),
    "parts": ("LoRAs, ControlNet and parts from elsewhere", "LoRA、ControlNet 与其他部件"),
    "none": ("none", "无"),
    "export": ("Export to ONNX", "导出为 ONNX"),
    # step 2
    "recipe_tab": ("2 Recipe", "2 配方"),
    "passes": ("Passes", "优化步骤"),
    "passes_info": (
        "What each does is said beside it; the order is that of the recipe",
        "每项旁边有说明；执行顺序以下方配方为准",
    ),
    "recipe": ("Recipe", "配方"),
    "recipe_info": (
        "The same as text, as sdopt optimize --passes takes it; press Enter to apply",
        "同一内容的文本形式，即 sdopt optimize --passes 的参数；按回车生效",
    ),
    "options": ("Options of the chosen passes", "所选步骤的参数"),
    "stage": ("Name of the stage", "阶段名称"),
    "from_stage": ("Start from the stage", "起始阶段"),
    "dry_run": ("Dry run", "试运行"),
    "optimize": ("Optimize", "优化"),
    "targets": ("Targets", "目标平台"),
    "targets_info": ("What is installed here stands beside each", "旁边标明本机是否已安装"),
    "precision": ("Precision", "精度"),
    "of_target": ("the target's own", "目标默认"),
    "target_options": ("More options of the targets", "目标的其他参数"),
    "target_options_info": (
        "As in a spec, applied to each target: provider=cuda, soc=Ascend310P3",
        "写法同命令行，用于每个目标：provider=cuda，soc=Ascend310P3",
    ),
    "shapes": ("Sizes", "尺寸"),
    "shapes_info": (
        "HEIGHTxWIDTH in pixels: 512x512,768x768 or 256x256..1024x1024; empty: the model's own",
        "高x宽（像素）：512x512,768x768 或 256x256..1024x1024；留空为模型默认",
    ),
    "batch": ("Images at once", "批大小"),
    "emit_only": (
        "Emit only: the lowered graphs and the compiler's commands",
        "只生成构建包：降级后的计算图与编译命令",
    ),
    "build": ("Build", "构建"),
    "convert": ("Optimize and build", "优化并构建"),
    # jobs
    "job": ("Job", "任务"),
    "no_job": ("No job yet.", "还没有任务。"),
    "cancel": ("Cancel", "取消"),
    "forget": ("Remove from the list", "从列表移除"),
    "log": ("Log", "日志"),
    "steps_so_far": ("Steps so far", "已完成的步骤"),
    "package": ("To download", "下载内容"),
    "package_info": (
        "Artifacts and emit-only packages of the chosen model",
        "所选模型的产物与构建包",
    ),
    "zip": ("Make a zip", "打包为 zip"),
    "download": ("Download", "下载"),
    "queued": ("queued", "排队中"),
    "running": ("running", "运行中"),
    "done": ("done", "已完成"),
    "failed": ("failed", "失败"),
    "cancelled": ("cancelled", "已取消"),
    "where": ("at", "位置"),
    "why": ("why", "原因"),
    "hint": ("try", "建议"),
    # results
    "component": ("Component", "组件"),
    "one_stage": ("Stage", "阶段"),
    "pass": ("Pass", "步骤"),
    "seconds": ("Seconds", "秒"),
    "nodes": ("Nodes", "节点数"),
    "rewritten": ("Rewritten", "已改写"),
    "left_alone": ("Left alone", "未改写"),
    "written": ("Written", "写入"),
    "up_to_date": ("up to date", "无需更新"),
    "before": ("before", "之前"),
    "after": ("after", "之后"),
    "operators": ("Operators before and after", "算子数量：之前与之后"),
    # look
    "look_tab": ("Look", "查看"),
    "stages": ("Stages", "阶段"),
    "stages_info": ("All where none is chosen", "不选则为全部"),
    "components": ("Components", "组件"),
    "with_compare": (
        "Measure how far each stage is from the raw one",
        "测量各阶段与原始阶段的偏差",
    ),
    "with_images": ("Draw images by every stage", "用每个阶段生成图像"),
    "show": ("Make the report", "生成报告"),
    "report": ("Report", "报告"),
    "no_report": ("No report of this model yet.", "该模型还没有报告。"),
    # draw
    "draw_tab": ("Draw", "生成图像"),
    "text_to_image": ("Text to image", "文生图"),
    "image_to_image": ("Image to image", "图生图"),
    "prompt": ("Prompt", "提示词"),
    "prompt_info": ("One a line", "每行一个"),
    "negative": ("Negative prompt", "反向提示词"),
    "steps": ("Steps", "步数"),
    "guidance": ("Guidance scale", "引导系数"),
    "seed": ("Seed", "随机种子"),
    "count": ("Images per prompt", "每个提示词的图像数"),
    "height": ("Height in pixels", "高（像素）"),
    "width": ("Width in pixels", "宽（像素）"),
    "size_info": ("0: the model's own", "0 为模型默认"),
    "scheduler": ("Scheduler", "调度器"),
    "own_scheduler": ("the model's own", "模型默认"),
    "runs_on": ("Runs", "运行"),
    "runs_on_info": ("A stage, or an artifact that can run here", "阶段，或本机可运行的产物"),
    "newest": ("the newest stage that fits", "最新可用阶段"),
    "against": ("Draw the same by", "对照"),
    "against_info": (
        "The same seeds by another stage, side by side",
        "用另一阶段以相同种子生成，并排比较",
    ),
    "start_image": ("Start image", "起始图像"),
    "strength": ("Strength", "强度"),
    "strength_info": ("How far to leave the start image", "偏离起始图像的程度"),
    "mask": ("Mask: white is drawn anew", "蒙版：白色区域重新生成"),
    "control": ("Hint of the ControlNet", "ControlNet 提示图"),
    "draw": ("Draw", "生成"),
    "images": ("Images", "图像"),
    "ab": ("A and B: move the slider", "A 与 B：拖动滑块"),
    "pair": ("Image", "第几张"),
    # messages
    "submitted": ("Queued: {title}", "已排队：{title}"),
    "taken": ("Uploaded: {name}", "已上传：{name}"),
    "nothing_missing": ("complete", "完整"),
    "lacks": ("lacks {parts}", "缺少 {parts}"),
    "family": ("Family", "模型系列"),
    "size": ("Size", "大小"),
}
"""Key to (English, Chinese)."""

LANGUAGES: Final = ("en", "zh")


def say(key: str, language: str = "en", **values: object) -> str:
    """A text of the table in a language (``en`` or ``zh``), its placeholders filled in."""
    return STRINGS[key][LANGUAGES.index(language)].format(**values)


def language_of(accepted: str | None) -> str:
    """The language of an Accept-Language header: Chinese where the first one named is."""
    return "zh" if (accepted or "").strip().lower().startswith("zh") else "en"


def tables() -> dict[str, dict[str, str]]:
    """The table by locale, as the browser looks it up."""
    english, chinese = (
        {key: texts[index] for key, texts in STRINGS.items()} for index in range(2)
    )
    return {"en": english, "zh": chinese, "zh-CN": chinese, "zh-TW": chinese, "zh-HK": chinese}
